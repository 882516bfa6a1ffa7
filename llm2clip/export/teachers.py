# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teachers that go into an export: those that the run learned from."""

from llm2clip.config import ConfigError, ExportConfig, Stage2Config
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.folder import check_encoding, teacher_fingerprint

__all__ = ['run_teachers']


def run_teachers(config: ExportConfig, run: Stage2Config, learned_from: Fingerprint) -> list[str]:
    """Folders of the teachers, checked without loading them; their weights are hashed only if all else is right.

    Args:
        config: Names them, or leaves it to the run.
        run: Configuration of the run.
        learned_from: The teachers that it learned from.

    Raises:
        ConfigError: None or too many are named, or a folder holds no teacher.
        ValueError: One is not the teacher that the run learned from.
    """
    if config.teacher and config.teachers:
        raise ConfigError('expected one of teacher (a folder that stage 1 wrote) and teachers (several of them)')
    named = config.teachers or [config.teacher or run.teacher or '']
    if len(learned_from) > 1 and len(named) != len(learned_from):
        names = f' ({", ".join(run.train_data.teachers)})' if run.train_data.teachers else ''
        raise ConfigError(f'teachers: the run in {config.run} was trained under {len(learned_from)} teachers'
                          f'{names}; got {len(list(filter(None, named)))} of their folders')
    if named == ['']:
        raise ConfigError(f'teacher: required but not set, since the config.yaml of {config.run} names none')
    if len(named) != len(learned_from):
        raise ConfigError(f'teachers: the run in {config.run} was trained under one teacher; got {len(named)}')
    for folder, fingerprint in zip(named, learned_from):
        check_encoding(folder, fingerprint, 'the run')
    for folder, fingerprint in zip(named, learned_from):
        teacher_fingerprint(folder).check(fingerprint, folder, 'the run')
    return named
