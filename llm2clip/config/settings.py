# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which settings of a training may change when it is resumed, and which decide what is learned and may not."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, TypeVar

from omegaconf import OmegaConf

from llm2clip.config.files import read_config
from llm2clip.config.models import PlanConfig
from llm2clip.config.ranges import ConfigError
from llm2clip.config.training import TrainConfig

__all__ = ['check_settings', 'difference', 'learned_settings', 'settings_in_folder']

C = TypeVar('C', bound=TrainConfig)

# Keys that may change: how long the training is, how it is watched, what it keeps, and what computes it.
_MAY_CHANGE = {
    'max_duration',
    'eval_data', 'eval_zeroshot', 'global_eval_batch_size', 'eval_interval', 'eval_first', 'callbacks', 'loggers',
    'progress_bar', 'log_to_console', 'console_log_interval', 'run_name',
    'save_folder', 'save_interval', 'save_num_checkpoints_to_keep', 'checkpoint_folder', 'autoresume', 'teacher_folder',
    'adapter_folder', 'lora_folder', 'cache_limit',
    'device', 'device_train_microbatch_size', 'dist_timeout', 'compile', 'fsdp', 'gradient_checkpointing', 'block_size',
    'grad_cache', 'num_workers', 'download_retry', 'download_timeout',
    *(field.name for field in dataclasses.fields(PlanConfig))}


def learned_settings(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that decides what is learned, as plain containers.

    A dataset is known by its `remote`, if it has one, since `local` is then a cache; otherwise by `local`.
    """
    def learned(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        left_out = _MAY_CHANGE | ({'local'} if node.get('remote') else set())
        return {str(name): learned(value) for name, value in node.items() if name not in left_out}

    return learned(OmegaConf.to_container(OmegaConf.structured(config)))


def check_settings(found: Mapping[str, Any], config: TrainConfig, where: str) -> None:
    """Raise a ConfigError that names the first setting of a run that is not as it was, with both values.

    `found` are the `learned_settings` that the run began with, and `where` says where they were found.
    """
    if (differing := difference(found, learned_settings(config))) is not None:
        raise ConfigError(f'save_folder: {where} was trained with other settings than these: {differing}; a run keeps '
                          'the settings that decide what it learns, so choose another save_folder for new ones')


def settings_in_folder(config: C) -> Optional[C]:
    """The configuration in the `save_folder` of a run, None if it has none; checked as `check_settings` does."""
    if not Path(config.save_folder, 'config.yaml').is_file():
        return None
    there = read_config(type(config), config.save_folder)
    check_settings(learned_settings(there), config, f'the run in {config.save_folder}')
    return there


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Optional[str]:
    """The first field in which two nested mappings differ, with both values; None if they are equal."""
    for name in sorted({*found, *expected}):
        a, b = found.get(name), expected.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if (inner := difference(a, b)) is not None:
                return f'{name}.{inner}'
        elif a != b:
            return f'{name} is {a!r}, expected {b!r}'
    return None
