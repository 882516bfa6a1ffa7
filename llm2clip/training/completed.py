# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings that have ended: what they left is that of the settings in their folder, and of no others."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from composer import Timestamp
from omegaconf import OmegaConf

from llm2clip.config import ConfigError, PlanConfig, TrainConfig
from llm2clip.config.files import read_config, save_config
from llm2clip.folders import check_replaceable
from llm2clip.ranks import agreed
from llm2clip.teacher.fingerprint import difference

__all__ = ['is_complete', 'write_settings']

# What may differ in a folder in which the same was learned: how it was watched, kept and computed.  The length of a
# training is not among its settings, since a run may go on.
_WATCHED = {
    'eval_data', 'eval_zeroshot', 'global_eval_batch_size', 'eval_interval', 'eval_first', 'callbacks', 'loggers',
    'log_interval', 'progress_bar', 'log_to_console', 'console_log_interval', 'run_name'}
_KEPT = {
    'max_duration', 'save_folder', 'save_interval', 'save_num_checkpoints_to_keep', 'checkpoint_folder', 'autoresume',
    'teacher_folder', 'adapter_folder', 'remote', 'cache_limit'}
_COMPUTED = {
    'device', 'device_train_microbatch_size', 'dist_timeout', 'compile', 'fsdp', 'gradient_checkpointing', 'block_size',
    'grad_cache', 'num_workers', 'download_retry', 'download_timeout'}
_LEFT_OUT = _WATCHED | _KEPT | _COMPUTED | {field.name for field in dataclasses.fields(PlanConfig)}


def _settings(config: Any) -> Any:
    """What decides what is learned, without the rest."""
    if not isinstance(config, Mapping):
        return config
    return {str(name): _settings(value) for name, value in config.items() if name not in _LEFT_OUT}


def _settings_there(config: TrainConfig) -> Optional[TrainConfig]:
    """Those in the folder of a run that has ended, None if it has none.

    Raises:
        ConfigError: What was trained is not what is asked for.
    """
    if not Path(config.save_folder, 'config.yaml').is_file():
        return None
    there = read_config(type(config), config.save_folder)
    found, expected = (_settings(OmegaConf.to_container(OmegaConf.structured(one))) for one in (there, config))
    if (differing := difference(found, expected)) is not None:
        raise ConfigError(f'save_folder: the run in {config.save_folder} has ended, and was trained with other '
                          f'settings than these: {differing}; choose another save_folder')
    return there


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
        there = _settings_there(config)
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
            there = _settings_there(config)
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
