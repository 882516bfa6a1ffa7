# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings that have ended: what they left is that of the settings in their folder, and of no others."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from composer import Timestamp

from llm2clip.config import ConfigError, TrainConfig
from llm2clip.config.files import save_config
from llm2clip.config.settings import settings_in_folder
from llm2clip.folders import check_replaceable
from llm2clip.ranks import agreed

__all__ = ['is_complete', 'write_settings']


def is_complete(config: TrainConfig, result: Path) -> bool:
    """Whether a run has ended and left its result; every rank calls this.

    Args:
        config: The run's, as it is asked for.
        result: A file that is there only when the run has ended.

    Returns:
        False also for one that was shorter, or longer, than it is asked for.

    Raises:
        ConfigError: It has ended, but was trained with other settings, or the result is that of another run.
    """
    def compute() -> bool:
        if not result.is_file():
            return False
        there = settings_in_folder(config)
        if there is None:
            raise ConfigError(f'{result.parent} is there already, but not of a run in {config.save_folder}, which has '
                              'no config.yaml; choose another folder for the result')
        return there.max_duration == config.max_duration

    return agreed(compute)


def write_settings(config: TrainConfig, reached: Timestamp, results: Mapping[Path, str]) -> None:
    """Put the resolved configuration into the folder of a run that begins or goes on; every rank calls this.

    Args:
        config: The run's.
        reached: How far it is.  The folder of a run that has ended is left as it is.
        results: Folder -> what it is (`check_replaceable`), of what it wrote if it ended before, which is removed if
            it goes on.

    Raises:
        ConfigError: It has ended, but was trained with other settings, or is to be longer and left no checkpoint.
    """
    def write() -> None:
        if reached >= config.max_duration:
            there = settings_in_folder(config)
            if there is not None and reached >= there.max_duration:
                return
        else:
            if reached.batch == 0 and any(folder.is_dir() and any(folder.iterdir()) for folder in results):
                raise ConfigError(f'save_folder: the run in {config.save_folder} has ended, and there is no checkpoint '
                                  'to go on from; choose another save_folder')
            for folder, kind in results.items():
                check_replaceable(folder, kind)
                shutil.rmtree(folder, ignore_errors=True)
        save_config(config, config.save_folder)  # last, or `is_complete` would take the results for those of this one

    agreed(write)
