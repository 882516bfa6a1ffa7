# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teachers that go into an export: those that the run learned from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from llm2clip.config import ConfigError, ExportConfig, Stage2Config
from llm2clip.data.image_embeddings import check_same_teacher
from llm2clip.teacher.caption_teacher import teacher_fingerprint
from llm2clip.teacher.folder import encoding, teacher_config

__all__ = ['check_encoding', 'run_teachers']


def run_teachers(config: ExportConfig, run: Stage2Config, record: dict[str, Any]) -> list[str]:
    """Folders of the teachers, checked without loading them; their weights are hashed only if all else is right.

    Args:
        config: Names them, or leaves it to the run.
        run: Configuration of the run.
        record: Fingerprints of the teachers that it learned from.

    Raises:
        ConfigError: None or too many are named, or a folder holds no teacher.
        ValueError: One is not the teacher that the run learned from.
    """
    fingerprints = record['teacher'].get('concatenated', [record['teacher']])
    if config.teacher and config.teachers:
        raise ConfigError('expected one of teacher (a folder that stage 1 wrote) and teachers (several of them)')
    named = config.teachers or [config.teacher or run.teacher or '']
    if len(fingerprints) > 1 and len(named) != len(fingerprints):
        raise ConfigError(f'teachers: the run in {config.run} was trained under {len(fingerprints)} teachers'
                          f'{_names(run)}; got {len(list(filter(None, named)))} of their folders')
    if named == ['']:
        raise ConfigError(f'teacher: required but not set, since the config.yaml of {config.run} names none')
    if len(named) != len(fingerprints):
        raise ConfigError(f'teachers: the run in {config.run} was trained under one teacher; got {len(named)}')
    for folder, fingerprint in zip(named, fingerprints):
        check_encoding(folder, fingerprint, 'the run')
    for folder, fingerprint in zip(named, fingerprints):
        check_same_teacher(teacher_fingerprint(folder), fingerprint, folder, 'the run')
    return named


def check_encoding(folder: Union[str, Path], fingerprint: Mapping[str, Any], reference: str) -> None:
    """Compare the teacher in a folder with a fingerprint in all but the weights, which need not be read.

    Raises:
        ConfigError: The folder holds no teacher.
        ValueError: It turns captions into vectors otherwise.
    """
    how = {'weights': fingerprint.get('weights'), **encoding(teacher_config(folder))}
    check_same_teacher(how, fingerprint, str(folder), reference)


def _names(run: Stage2Config) -> str:
    return f' ({", ".join(run.train_data.teachers)})' if run.train_data.teachers else ''
