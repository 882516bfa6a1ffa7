# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a run takes over from the one before it in its folder: its result, its settings and its random state."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from composer import Callback, Timestamp
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from llm2clip.config import ConfigError, TrainConfig
from llm2clip.config.files import check_settings, learned_settings, save_config, settings_in_folder
from llm2clip.folders import check_replaceable
from llm2clip.ranks import broadcast_from_rank0

__all__ = ['KeepSettings', 'ResumeRandomState', 'is_complete', 'write_settings']


def is_complete(config: TrainConfig, result: Path) -> bool:
    """Whether a run has ended, as long as it is asked for, and left its result, a file that is there only then; every
    rank calls this.

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

    complete = broadcast_from_rank0(compute)
    if complete and dist.get_global_rank() == 0:
        print(f'{result.parent} is complete')
    return complete


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

    broadcast_from_rank0(write)


class KeepSettings(Callback):
    """Write the settings that decide what is learned into every checkpoint, which may be all that another machine has,
    and refuse to resume with others."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return {'settings': json.dumps(learned_settings(self.config))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_settings(json.loads(state['settings']), self.config, f'the run in {self.config.checkpoint_folder}')


class ResumeRandomState(Callback):
    """Load a checkpoint's random state before the first batch after a resumption.

    Composer 0.32.1 does not where the dataset itself resumes in the middle of an epoch, as Streaming's does: dropout
    would go on with other masks.  There is one state per rank, as the Trainer read them.
    """

    def __init__(self, rng_state: list[dict[str, Any]]) -> None:
        self._rng_state: Optional[list[dict[str, Any]]] = rng_state

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._rng_state is not None:
            reproducibility.load_rng_state(self._rng_state)
            self._rng_state = None
