# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Build Composer's Trainer from a configuration, and train with it."""

import dataclasses
import gc
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

from composer import Algorithm, Callback, DataSpec, Evaluator, Trainer
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from torch.distributed import distributed_c10d

from llm2clip.config import TrainConfig
from llm2clip.config.loading import learned_settings, settings_in_folder
from llm2clip.device import get_device, set_up_process
from llm2clip.errors import ConfigError
from llm2clip.io.folders import check_replaceable
from llm2clip.io.remotes import reaching
from llm2clip.models.sharding import compile_blocks, fsdp2_config, set_up_units
from llm2clip.ranks import broadcast_from_rank0, dist, is_first
from llm2clip.registry import build, build_all, named
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.training.algorithms.weights import AverageGlooGradients
from llm2clip.training.callbacks.jsonl_logger import METRICS_FILE, JSONLLogger, read_metrics
from llm2clip.training.callbacks.monitors import ProgressBar, SaveBest, StepMonitor, StopAtNonfinite
from llm2clip.training.callbacks.resumption import (
    KeepSettings,
    RemoveUploaded,
    ResumeRandomState,
    naming_missing_states,
)
from llm2clip.training.checkpoints import check_shared, find_checkpoint, written_checkpoints
from llm2clip.training.config_checks import check_compiler, check_train_config, evaluated_metrics
from llm2clip.training.optim import build_optimizer
from llm2clip.training.run_folder import write_settings


@dataclass
class Parts:
    """What a training is made of, beside its configuration."""

    model: ComposerModel
    train_data: DataSpec
    evaluators: list[Evaluator] = field(default_factory=list)
    algorithms: list[Algorithm] = field(default_factory=list)
    """Algorithms that follow the configured ones."""
    callbacks: list[Callback] = field(default_factory=list)
    """Callbacks that follow the configured ones."""
    teacher: Optional[TeacherRecord] = None
    """Record of the teacher for the folder of the run."""


def initialize(config: TrainConfig, results: Mapping[Path, str]) -> None:
    """Initialise the process group and check the configuration, also against that of a run to resume.

    `results` maps the folders that the end of the training writes to their kinds (`check_replaceable`).
    """
    for folder, kind in results.items():
        check_replaceable(folder, kind)
    if any(Path(config.checkpoint_folder).glob('ep*-ba*')):
        if not config.autoresume:
            raise ConfigError(f'false, but {config.checkpoint_folder} has checkpoints of a run, expected '
                              'true, or another save_folder', key='autoresume')
        settings_in_folder(config)
    device = get_device(config.device)
    set_up_process(device, config.precision)
    dist.initialize_dist(device, config.dist_timeout)
    check_train_config(dataclasses.replace(config, device=device.name))
    check_compiler(config)


def run_training(config: TrainConfig, parts: Parts, results: Collection[Path]) -> None:
    """Train from the newest checkpoint, if any, until `max_duration`; a no-op for a complete run.

    The folders `results`, if a shorter run wrote them, are removed at the start.
    """
    trainer = build_trainer(config, parts.model, parts.train_data, parts.evaluators, parts.algorithms,
                            parts.callbacks)
    if parts.teacher is not None and is_first():
        parts.teacher.write(config.save_folder)
    write_settings(config, trainer.state.timestamp, results)
    fit(trainer, config)
    trainer.close()


def build_trainer(
    config: TrainConfig, model: ComposerModel, train_data: DataSpec, evaluators: Sequence[Evaluator] = (),
    more_algorithms: Sequence[Algorithm] = (), more_callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Build Composer's Trainer, and load the newest checkpoint.

    `more_algorithms` and `more_callbacks` follow the configured ones.
    """
    optimizer = build_optimizer(config, model)
    # Composer runs the algorithms of an `after_…` event in reverse order: gradients are averaged, then
    # measured, then clipped.
    algorithms = _build_algorithms(config, train_data)
    monitor = StepMonitor(config.log_gradient_norms)
    algorithms += [*more_algorithms, monitor, AverageGlooGradients()]
    settings = KeepSettings(config)
    callbacks: list[Callback] = [settings, StopAtNonfinite(monitor)]
    callbacks += [*_build_callbacks(config), *more_callbacks]
    loggers = _build_loggers(config)
    check_shared(config.checkpoint_folder)
    checkpoint = None
    if config.autoresume:
        sharded = config.fsdp is not None and config.fsdp.state_dict_type == 'sharded'
        checkpoint = find_checkpoint(config.checkpoint_folder, sharded)
    if config.compile is not None:
        compile_blocks(model, **config.compile)
    trainer = reaching(config.checkpoint_folder)(naming_missing_states(config)(Trainer))(
        model=model,
        optimizers=optimizer,
        schedulers=build('scheduler', *named(config.scheduler, 'scheduler')),
        train_dataloader=train_data,
        eval_dataloader=list(evaluators) or None,
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=loggers,
        run_name=config.run_name,
        max_duration=config.max_duration,
        device_train_microbatch_size=config.device_train_microbatch_size,
        # MNTP's loss is a mean over masked tokens, and their number differs between microbatches and ranks.
        accumulate_train_batch_on_tokens=not config.has_negatives,
        # A model with `save_trainable_only` checks its weights itself.
        load_strict_model_weights='should_save_peft_only' not in vars(model),
        eval_interval=config.eval_interval if evaluators else 1,  # Composer warns of others
        load_path=checkpoint,
        save_folder=config.checkpoint_folder,
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        # A run that was killed while writing a checkpoint leaves a damaged one in the way of the resumed run.
        save_overwrite=config.autoresume,
        progress_bar=False,
        log_to_console=config.log_to_console,
        console_log_interval=config.console_log_interval,
        device=get_device(config.device),
        precision=config.precision,
        seed=config.seed,
        dist_timeout=config.dist_timeout,
        parallelism_config=None if config.fsdp is None else {'fsdp': fsdp2_config(config.fsdp)},
    )
    set_up_process(trainer.state.device, config.precision)  # Composer may have turned TF32 on again
    if 'wandb' in config.loggers:
        _log_to_wandb(trainer, config, config.loggers['wandb'], settings.run_id)
    if config.fsdp is not None:
        _set_up_shards(trainer, config.dist_timeout)
    if '://' in config.checkpoint_folder and not is_first():
        trainer.state.callbacks.append(RemoveUploaded(trainer))
    if checkpoint is not None and is_first():
        batch = trainer.state.timestamp.batch.value
        trainer.saved_checkpoints.extend(
            written_checkpoints(config.checkpoint_folder, batch, config.save_num_checkpoints_to_keep))
        is_complete = trainer.state.timestamp >= config.max_duration
        status = 'complete at' if is_complete else 'resumes from'
        print(f'{status} batch {batch} (max_duration: {config.max_duration}), {checkpoint}', flush=True)
    return trainer


def _set_up_shards(trainer: Trainer, timeout: float) -> None:
    """Let the groups of a sharded model wait for `timeout` seconds, and set the precision of its units."""
    if trainer.state.device_mesh is not None:
        # PyTorch 2.7 has the private function alone.
        set_timeout = getattr(distributed_c10d, 'set_timeout', distributed_c10d._set_pg_timeout)
        for group in trainer.state.device_mesh.get_all_groups():  # those of replicas would have 10 minutes
            set_timeout(timedelta(seconds=timeout), group)
    # Reference cycles keep the unsharded weights alive, which are as large as the model.
    gc.collect()
    sharding = set_up_units(trainer.state.model)
    if is_first():
        print(sharding, flush=True)


def _build_algorithms(config: TrainConfig, train_data: DataSpec) -> list[Algorithm]:
    """Build the configured algorithms; `GradCache` splits batches as the loader does."""
    arguments = dict(config.algorithms)
    if 'grad_cache' in arguments:
        arguments['grad_cache'] = {'split_batch': train_data.split_batch,
                                   'microbatch_transforms': train_data.microbatch_transforms}
    return build_all('algorithms', arguments)


def _build_callbacks(config: TrainConfig) -> list[Callback]:
    """Build the configured callbacks; by default, `SaveBest` writes into the folder of the run."""
    arguments = dict(config.callbacks)
    if 'save_best' in arguments:
        save_best = arguments['save_best']
        arguments['save_best'] = save_best | {'folder': save_best.get('folder') or config.save_folder}
    return build_all('callbacks', arguments)


def fit(trainer: Trainer, config: TrainConfig) -> None:
    """Train until `max_duration`, and evaluate; a no-op for a run that has done both."""
    if trainer.state.timestamp >= config.max_duration:
        if broadcast_from_rank0(lambda: _lacks_last_evaluation(trainer, config)):
            trainer.eval()
        return
    if trainer._rng_state is not None:
        trainer.state.callbacks.append(ResumeRandomState(trainer._rng_state))
    if config.eval_first and trainer.state.timestamp.batch.value == 0:
        trainer.eval()
    with reaching(config.checkpoint_folder):
        trainer.fit()


def _lacks_last_evaluation(trainer: Trainer, config: TrainConfig) -> bool:
    """Whether a complete run was stopped in the evaluation at its end, which follows the last checkpoint."""
    logged = read_metrics(Path(config.save_folder, METRICS_FILE))
    batch = trainer.state.timestamp.batch.value
    for label, names in evaluated_metrics(trainer.state.evaluators).items():
        if batch not in logged.get(f'metrics/{label}/{names[0]}', {}):
            return True
    for callback in trainer.state.callbacks:
        if isinstance(callback, SaveBest):
            value = logged[f'metrics/{callback.metric_key}'][batch]
            if value > callback.in_file:
                return True
    return False


def _build_loggers(config: TrainConfig) -> list[LoggerDestination]:
    """Build all loggers except `wandb`, which `_log_to_wandb` adds."""
    arguments = {name: dict(values) for name, values in config.loggers.items() if name != 'wandb'}
    if 'tensorboard' in arguments:
        arguments['tensorboard'].setdefault('log_dir', f'{config.save_folder}/tensorboard')
    loggers: list[LoggerDestination] = build_all('loggers', arguments)
    if config.progress_bar:
        loggers.append(ProgressBar())
    return [*loggers, JSONLLogger(Path(config.save_folder, METRICS_FILE))]


def _log_to_wandb(trainer: Trainer, config: TrainConfig, arguments: dict[str, Any], run_id: str) -> None:
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
