# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Build Composer's Trainer from a configuration, and train with it."""

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Trainer
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.models import ComposerModel
from composer.utils import reproducibility
from torch.distributed.checkpoint.api import CheckpointException

from llm2clip.config import FsdpConfig, TrainConfig
from llm2clip.config.loading import check_settings, learned_settings, settings_in_folder
from llm2clip.data.streams.safe_dataset import device_batch_size
from llm2clip.device import get_device, set_up_process
from llm2clip.errors import ConfigError, refuse, under
from llm2clip.io.remotes import reaching
from llm2clip.models.sharding import compile_blocks, fsdp2_config, set_up_units
from llm2clip.ranks import broadcast_from_rank0, get_world_size, initialize_dist, is_first
from llm2clip.registry import build, build_all, check, check_arguments, named
from llm2clip.training.algorithms.weights import AverageGlooGradients
from llm2clip.training.callbacks.jsonl_logger import METRICS_FILE, JSONLLogger, read_metrics
from llm2clip.training.callbacks.monitors import ProgressBar, SaveBest, StepMonitor, StopAtNonfinite
from llm2clip.training.checkpoints import check_shared, find_checkpoint, written_checkpoints
from llm2clip.training.optim import build_optimizer


def initialize(config: TrainConfig) -> None:
    """Initialise the process group and check the configuration, also against that of a run to resume."""
    if any(Path(config.checkpoint_folder).glob('ep*-ba*')):
        if not config.autoresume:
            raise ConfigError(f'false, but {config.checkpoint_folder} has checkpoints of a run, expected '
                              'true, or another save_folder', key='autoresume')
        settings_in_folder(config)
    device = get_device(config.device)
    set_up_process(device, config.precision)
    initialize_dist(device, config.dist_timeout)
    check_train_config(dataclasses.replace(config, device=device.name))


def check_train_config(config: TrainConfig) -> None:
    """Check parts, device and ranks before anything is loaded; errors are ConfigErrors.

    `config.check` has checked what depends on the configuration alone.
    """
    name, arguments = named(config.optimizer, 'optimizer')
    build('optimizer', name, {'params': [torch.nn.Parameter(torch.zeros(1))]} | arguments)
    build('scheduler', *named(config.scheduler, 'scheduler'))
    build_all('algorithms', config.algorithms)
    build_all('callbacks', config.callbacks)
    for name, arguments in config.loggers.items():
        check('loggers', name, arguments, f'loggers.{name}')
    if config.compile is not None:
        with under('compile'):
            check_arguments(torch.compile, 'torch.compile', config.compile)
    device_batch = device_batch_size(config.global_train_batch_size, 'global_train_batch_size')
    microbatch = config.device_train_microbatch_size or device_batch
    fsdp, ranks = config.fsdp or FsdpConfig(), get_world_size()
    groups, shards = fsdp.reshard_after_forward, ranks // fsdp.replicate
    refuse([
        ('precision', config.device == 'cpu' and config.precision not in (None, 'fp32'),
         f'{config.precision}, expected fp32, the only one on a CPU'),
        ('fsdp.replicate', ranks % fsdp.replicate,
         f'{fsdp.replicate} copies of the model, expected a number that divides that of the ranks, {ranks}'),
        ('fsdp.reshard_after_forward', not isinstance(groups, bool) and shards % groups,
         f'{groups} ranks, expected true, false or a number that divides that of the ranks of a copy of the '
         f'model, {shards}'),
        ('device_train_microbatch_size', microbatch > device_batch,
         f'{microbatch}, expected at most the device batch size, {device_batch}'),
        ('device_train_microbatch_size',
         config.has_negatives and microbatch < device_batch and 'grad_cache' not in config.algorithms,
         f'{microbatch} is not the device batch size, {device_batch}. A contrastive loss on a microbatch '
         'would only see the negatives inside it. Add `algorithms: {grad_cache: {}}`, which keeps the loss '
         'that of the global batch, or leave the key out, or lower global_train_batch_size.'),
    ])


def evaluated_metrics(evaluators: Sequence[Evaluator]) -> dict[str, list[str]]:
    """Map the label of each evaluator to the names of its metrics."""
    return {evaluator.label: evaluator.metric_names or [] for evaluator in evaluators}


def check_metrics(config: TrainConfig, metrics: Mapping[str, Sequence[str]]) -> None:
    """Raise a ConfigError if `eval_first` or a callback needs an evaluation or a metric that is not computed.

    `metrics` maps the label of each evaluation to the names of its metrics.
    """
    if config.eval_first and not metrics:
        raise ConfigError('there is no eval_data, expected something to evaluate', key='eval_first')
    if 'save_best' in config.callbacks:
        best = SaveBest(**config.callbacks['save_best'])
        label = best.dataloader_label
        computed = metrics.get(label, [])
        refuse([
            ('callbacks.save_best.dataloader_label', label not in metrics,
             f'there is no evaluation called {label!r}, expected some on which {best.metric} is computed'),
            ('callbacks.save_best.metric', best.metric not in computed,
             f'{best.metric!r} is never computed on {label}, expected {" or ".join(computed)}'),
        ])


def build_trainer(
    config: TrainConfig, model: ComposerModel, train_data: DataSpec, evaluators: Sequence[Evaluator] = (),
    more_algorithms: Sequence[Algorithm] = (), more_callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Build Composer's Trainer; `more_algorithms` and `more_callbacks` follow the configured ones."""
    optimizer = build_optimizer(config, model)
    # Composer runs the algorithms of an `after_…` event in reverse order: gradients are averaged, then
    # measured, then clipped.
    algorithms = _build_algorithms(config, train_data)
    algorithms += [*more_algorithms, StepMonitor(config.log_gradient_norms), AverageGlooGradients()]
    settings = KeepSettings(config)
    callbacks: list[Callback] = [settings, StopAtNonfinite()]
    callbacks += [*_build_callbacks(config), *more_callbacks]
    loggers = _build_loggers(config)
    check_shared(config.checkpoint_folder)
    checkpoint = None
    if config.autoresume:
        sharded = config.fsdp is not None and config.fsdp.state_dict_type == 'sharded'
        checkpoint = find_checkpoint(config.checkpoint_folder, sharded)
    if config.compile is not None:
        compile_blocks(model, **config.compile)
    trainer = reaching(config.checkpoint_folder)(_naming_callbacks(config)(Trainer))(
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
        log_to_wandb(trainer, config, config.loggers['wandb'], settings.run_id)
    if config.fsdp is not None:
        # Reference cycles keep the unsharded weights alive, which are as large as the model.
        gc.collect()
        sharding = set_up_units(trainer.state.model)
        if is_first():
            print(sharding, flush=True)
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


@contextmanager
def _naming_callbacks(config: TrainConfig) -> Iterator[None]:
    """Name a callback whose state is not in a sharded checkpoint, since the run began without it."""
    try:
        yield
    except CheckpointException as error:
        for name, arguments in config.callbacks.items():
            kind = check('callbacks', name, arguments).__qualname__
            if f'state.callbacks.{kind}.' in str(error):
                raise ConfigError('its state is not in the sharded checkpoint, since the run began without '
                                  'it; expected only callbacks without a state to be added later',
                                  f'callbacks.{name}') from error
        raise


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


def _build_loggers(config: TrainConfig) -> list[LoggerDestination]:
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


class KeepSettings(Callback):
    """Store the settings that affect learning in every checkpoint, and refuse to resume with other settings.
    On another machine, the checkpoint may be the only record of them, and of the `run_id`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.run_id = broadcast_from_rank0(lambda: os.urandom(8).hex())

    def state_dict(self) -> dict[str, Any]:
        # One string, since sharded checkpoints load no keys that they were written without.
        return {'settings': json.dumps(learned_settings(self.config) | {'run_id': self.run_id})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        settings = json.loads(state['settings'])
        self.run_id = settings.pop('run_id', self.run_id)
        check_settings(settings, self.config, f'the run in {self.config.checkpoint_folder}')


class RemoveUploaded(Callback):
    """Remove the temporary files of sharded checkpoints for an object store, on a rank other than the first.

    The uploader has its own copies.  Composer 0.32.1 removes the temporary files of rank 0 only.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        for path in self.trainer.saved_checkpoints:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.batch_checkpoint(state, logger)


class ResumeRandomState(Callback):
    """Restore a checkpoint's random state, one per rank, before the first batch of a resumed run.

    Composer 0.32.1 does not do so if the dataset itself resumes in the middle of an epoch,
    as Streaming's does.
    """

    def __init__(self, rng_state: list[dict[str, Any]]) -> None:
        self._rng_state: Optional[list[dict[str, Any]]] = rng_state

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._rng_state is not None:
            reproducibility.load_rng_state(self._rng_state)
            self._rng_state = None
