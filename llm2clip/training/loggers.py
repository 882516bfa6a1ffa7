# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Loggers of a training, configured and built in."""

import os
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.loggers import LoggerDestination

from llm2clip.config import TrainConfig
from llm2clip.config.loading import learned_settings
from llm2clip.ranks import is_first
from llm2clip.registry import build, build_all
from llm2clip.training.callbacks.jsonl_logger import METRICS_FILE, JSONLLogger
from llm2clip.training.callbacks.monitors import ProgressBar


def build_loggers(config: TrainConfig) -> list[LoggerDestination]:
    """Build all loggers except `wandb`, which `log_to_wandb` adds."""
    arguments = {name: dict(values) for name, values in config.loggers.items() if name != 'wandb'}
    if 'tensorboard' in arguments:
        arguments['tensorboard'].setdefault('log_dir', f'{config.save_folder}/tensorboard')
    loggers: list[LoggerDestination] = build_all('loggers', arguments)
    if config.progress_bar:
        loggers.append(ProgressBar())
    return [*loggers, JSONLLogger(Path(config.save_folder, METRICS_FILE))]


def log_to_wandb(trainer: Trainer, config: TrainConfig, arguments: dict[str, Any], run_id: str) -> None:
    """Add Composer's logger for W&B, after the checkpoint is loaded, which names the W&B run to continue."""
    options = {'dir': os.environ.get('WANDB_DIR', config.save_folder), 'resume': 'allow',
               'config': learned_settings(config)}
    if is_first() and 'WANDB_RUN_ID' not in os.environ:
        options['id'] = run_id
    options.update(arguments.get('init_kwargs', {}))
    logger = build('loggers', 'wandb', arguments | {'init_kwargs': options}, 'loggers.wandb')
    trainer.logger.destinations = (*trainer.logger.destinations, logger)
    trainer.state.callbacks.append(logger)
    logger.init(trainer.state, trainer.logger)
