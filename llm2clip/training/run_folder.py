# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The settings in the folder of a training run, and whether the run is complete."""

import shutil
from collections.abc import Collection
from pathlib import Path

from composer import Timestamp

from llm2clip.config import TrainConfig
from llm2clip.config.loading import save_config, settings_in_folder
from llm2clip.errors import ConfigError
from llm2clip.ranks import broadcast_from_rank0, is_first


def is_complete(config: TrainConfig, result: Path) -> bool:
    """Return whether a run has ended at the configured `max_duration`, with its result; every rank calls
    this.  `result` is a file that exists only after the end of a run.

    Raises:
        ConfigError: The run has ended, but with other settings, or the result belongs to another run.
    """
    def compute() -> bool:
        if not result.is_file():
            return False
        saved_config = settings_in_folder(config)
        if saved_config is None:
            raise ConfigError(f'{result.parent} is there already, but not of a run in {config.save_folder}, '
                              'which has no config.yaml; choose another folder for the result')
        return saved_config.max_duration == config.max_duration

    complete = broadcast_from_rank0(compute)
    if complete and is_first():
        print(f'{result.parent} is complete')
    return complete


def write_settings(config: TrainConfig, reached: Timestamp, results: Collection[Path]) -> None:
    """Write the resolved configuration into the folder of a new or resumed run; every rank calls this.

    The folder of a run that has `reached` its end is unchanged.  If an ended run is extended, the folders of
    its `results` are removed.

    Raises:
        ConfigError: The run has ended with other settings, or is to be extended but has no checkpoint.
    """
    def write() -> None:
        if reached >= config.max_duration:
            saved_config = settings_in_folder(config)
            if saved_config is not None and reached >= saved_config.max_duration:
                return
        else:
            if reached.batch == 0 and any(any(folder.glob('*')) for folder in results):
                raise ConfigError(f'the run in {config.save_folder} has ended, and there is no checkpoint to '
                                  'resume from; choose another save_folder', key='save_folder')
            for folder in results:
                shutil.rmtree(folder, ignore_errors=True)
        # last, since `is_complete` must not see it beside old results
        save_config(config, config.save_folder)

    broadcast_from_rank0(write)
