# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Build Composer's Trainer from a configuration, and train with it."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Trainer
from composer.core import State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.models import ComposerModel
from composer.utils import dist, reproducibility

from llm2clip.config import FsdpConfig, InheritanceConfig, Stage1Config, Stage2Config, TrainConfig
from llm2clip.config.loading import check_settings, learned_settings
from llm2clip.data.streams.safe_dataset import device_batch_size
from llm2clip.device import open_device
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.io.files import is_out_of_shared_memory
from llm2clip.io.remotes import reaching
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.models.inherited_adapter import ComposerInheritance
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.models.sharding import compile_blocks, fsdp2_config, set_up_units
from llm2clip.ranks import broadcast_from_rank0
from llm2clip.registry import build, build_all, check, check_arguments, named
from llm2clip.training.algorithms.grad_cache import GradCache
from llm2clip.training.algorithms.weights import AverageGlooGradients
from llm2clip.training.callbacks.jsonl_logger import JSONLLogger
from llm2clip.training.callbacks.monitors import ProgressBar, SaveBest, StepMonitor, StopAtNonfinite, TextMonitor
from llm2clip.training.checkpoints import check_shared, find_checkpoint, written_checkpoints
from llm2clip.training.optim import FUSED_SHARDS, build_optimizer


def initialize(config: TrainConfig) -> None:
    """Initialise the process group and check the configuration."""
    device = open_device(config.device, config.precision)
    dist.initialize_dist(device, config.dist_timeout)
    check_train_config(dataclasses.replace(config, device=device.name))


def check_train_config(config: TrainConfig) -> None:
    """Check names, arguments and batch sizes before anything is loaded; errors are ConfigErrors."""
    if config.device == 'cpu' and config.precision not in (None, 'fp32'):
        raise ConfigError(f'precision: {config.precision}, expected fp32, the only one on a CPU')
    name, arguments = named(config.optimizer, 'optimizer')
    build('optimizer', name, {'params': [torch.nn.Parameter(torch.zeros(1))]} | arguments)
    if config.fsdp is not None and arguments.get('fused') and name not in FUSED_SHARDS:
        raise ConfigError(f'optimizer.fused: {name} has no kernel for weights that fsdp shards; leave it out')
    name, arguments = named(config.scheduler, 'scheduler')
    build('scheduler', name, arguments)
    if name.endswith('_with_warmup'):
        _check_warmup(arguments['t_warmup'], arguments.get('t_max', '1dur'), config.max_duration)
    build_all('algorithms', config.algorithms)
    if config.fsdp is not None and 'channels_last' in config.algorithms:
        raise ConfigError('algorithms.channels_last: fsdp cannot shard such weights; leave out one of the two')
    build_all('callbacks', config.callbacks)
    if 'save_best' in config.callbacks and not isinstance(config, Stage2Config):
        raise ConfigError('callbacks.save_best: only the weights of stage 2 can be read from it, expected none here')
    for name, arguments in config.loggers.items():
        check('loggers', name, arguments or {}, f'loggers.{name}')
    if config.compile is not None:
        _check_compile(config.compile)
    if config.fsdp is not None:
        _check_fsdp(config.fsdp, config.device)
    _check_microbatch(config)
    if isinstance(config, Stage1Config):
        if config.fsdp is not None and config.text_encoder.dtype != 'float32':
            raise ConfigError(f'text_encoder.dtype: {config.text_encoder.dtype} does not go with fsdp, which needs '
                              'the float32 of the LoRA weights everywhere; precision: amp_bf16 computes in bfloat16')
        if config.objective == 'mntp' and config.eval_data is not None:
            raise ConfigError('eval_data: objective mntp has no evaluation')
    if isinstance(config, Stage2Config):
        vision = config.model.vision
        if vision.freeze and vision.lora is not None:
            raise ConfigError('model.vision.lora: model.vision.freeze freezes these weights, too; set one of the two')
        if vision.gradient_checkpointing and config.fsdp is not None and config.fsdp.activation_checkpointing:
            raise ConfigError('fsdp.activation_checkpointing: model.vision.gradient_checkpointing recomputes '
                              'the same blocks already; set one of the two to false')
    for key in ('train_data', 'eval_data'):
        _check_proportions(getattr(getattr(config, key, None), 'streams', {}), key)


def _check_compile(arguments: dict[str, Any]) -> None:
    """Raise a ConfigError if `torch.compile` does not know an argument, backend, mode or option."""
    with under('compile'):
        check_arguments(torch.compile, 'torch.compile', arguments)
    try:
        torch.compile(torch.nn.Identity(), **arguments)
    except (RuntimeError, TypeError) as error:
        # Keep the start of a message that lists hundreds of options.
        reason = str(error).splitlines()[0].partition(', known options are')[0]
        raise ConfigError(f'compile: {reason}') from None


def _check_microbatch(config: TrainConfig) -> None:
    """Raise a ConfigError if the microbatch does not fit the batch, or would hide negatives from the loss."""
    device_batch = device_batch_size(config.global_train_batch_size, 'global_train_batch_size')
    microbatch = config.device_train_microbatch_size or device_batch
    if not 0 < microbatch <= device_batch:
        raise ConfigError(f'device_train_microbatch_size: {microbatch} is not between 1 and the device batch '
                          f'size, {device_batch}')
    has_negatives = not isinstance(config, Stage1Config) or config.objective == 'contrastive'
    if has_negatives and microbatch < device_batch and 'grad_cache' not in config.algorithms:
        raise ConfigError(
            f'device_train_microbatch_size: {microbatch} is not the device batch size, {device_batch}. A contrastive '
            'loss on a microbatch would only see the negatives inside it. Add `algorithms: {grad_cache: {}}`, '
            'which keeps the loss that of the global batch, or leave the key out, or lower global_train_batch_size.')
    if not has_negatives and 'grad_cache' in config.algorithms:
        raise ConfigError('algorithms.grad_cache: objective mntp has no negatives; its microbatches need no cache')


def _check_proportions(streams: Mapping[str, Any], key: str) -> None:
    """Raise a ConfigError if only some datasets under `key` have a proportion, or one has a repeat, too."""
    for name, stream in streams.items():
        if stream.proportion is not None and stream.repeat is not None:
            raise ConfigError(f'{key}.streams.{name}.repeat: proportion is set, too, expected one of the two')
    without = [name for name, stream in streams.items() if stream.proportion is None]
    if 0 < len(without) < len(streams):
        raise ConfigError(f'{key}.streams.{without[0]}.proportion: required but not set, since other '
                          f'datasets of {key} have one')


def _check_warmup(t_warmup: str, t_max: str, max_duration: str) -> None:
    """Raise a ConfigError if Composer cannot compare the units of a schedule's warm-up and of its end."""
    units = set()
    for time in (t_warmup, t_max):
        unit = Time.from_timestring(max_duration if time.endswith('dur') else time).unit
        units.add(TimeUnit.BATCH if unit == TimeUnit.EPOCH else unit)  # an epoch is a number of batches
    if len(units) > 1:
        raise ConfigError(f'scheduler.t_warmup: {t_warmup}, expected a share such as 0.1dur, or the unit of '
                          f'max_duration, {max_duration}, and of t_max, {t_max}')


def _check_fsdp(config: FsdpConfig, device: Optional[str]) -> None:
    """Raise a ConfigError if the FSDP options do not fit the ranks or the `device`, ``gpu`` or ``cpu``."""
    ranks = dist.get_world_size()
    groups = config.reshard_after_forward
    if ranks % config.replicate:
        raise ConfigError(f'fsdp.replicate: {config.replicate} copies of the model, expected a number that '
                          f'divides that of the ranks, {ranks}')
    shards = ranks // config.replicate
    if not isinstance(groups, bool) and (groups < 1 or shards % groups):
        raise ConfigError(f'fsdp.reshard_after_forward: {groups} ranks, expected true, false or a number '
                          f'that divides that of the ranks of a copy of the model, {shards}')
    if config.activation_cpu_offload and device == 'cpu':
        raise ConfigError("fsdp.activation_cpu_offload: activations on a CPU are in the host's memory already")


def check_metrics(config: TrainConfig, evaluated: Optional[Mapping[str, Sequence[str]]] = None) -> None:
    """Raise a ConfigError if `eval_first` or a callback needs an evaluation or a metric that is not computed.

    `evaluated` maps the label of each evaluation to its metrics.  None: all metrics that the configuration
    allows, since the metrics of a zero-shot set depend on its files.
    """
    if evaluated is None:
        evaluated = {}
        if getattr(config, 'eval_data', None) is not None:
            metrics = {Stage1Config: CaptionContrastive.metrics, Stage2Config: ComposerLLM2CLIP.retrieval_metrics,
                       InheritanceConfig: ComposerInheritance.metrics}
            evaluated['eval'] = list(metrics[type(config)])
        if isinstance(config, Stage2Config):
            zeroshot = ComposerLLM2CLIP.zeroshot_metrics | ComposerLLM2CLIP.multilabel_metrics
            evaluated.update(dict.fromkeys(config.eval_zeroshot, list(zeroshot)))
    if config.eval_first and not evaluated:
        raise ConfigError('eval_first: there is no eval_data, expected something to evaluate')
    if 'save_best' not in config.callbacks:
        return
    best = SaveBest(**(config.callbacks['save_best'] or {}))
    if not evaluated:
        raise ConfigError('callbacks.save_best: there is no eval_data, expected some on which '
                          f'{best.metric} is computed')
    if best.dataloader_label not in evaluated:
        raise ConfigError(f'callbacks.save_best.dataloader_label: nothing called {best.dataloader_label!r} '
                          f'is evaluated, expected {" or ".join(evaluated)}')
    computed = evaluated[best.dataloader_label]
    if best.metric not in computed:
        raise ConfigError(f'callbacks.save_best.metric: {best.metric!r} is never computed on {best.dataloader_label}, '
                          f'expected {" or ".join(computed)}')


def build_trainer(
    config: TrainConfig, model: ComposerModel, train_data: DataSpec, evaluators: Sequence[Evaluator] = (),
    more_algorithms: Sequence[Algorithm] = (),
) -> Trainer:
    """Build Composer's Trainer; `more_algorithms` follow the configured algorithms."""
    optimizer = build_optimizer(config, model)
    algorithms: list[Algorithm] = build_all('algorithms', config.algorithms)
    for algorithm in algorithms:
        if isinstance(algorithm, GradCache):
            algorithm.split_batch = train_data.split_batch
            algorithm.microbatch_transforms = train_data.microbatch_transforms
    # Composer runs the algorithms of an `after_…` event in reverse order: gradients are averaged, then
    # measured, then clipped.
    algorithms += [*more_algorithms, StepMonitor(), AverageGlooGradients()]
    settings = KeepSettings(config)
    callbacks: list[Callback] = [
        settings, StopAtNonfinite(config.checkpoint_folder), *build_all('callbacks', config.callbacks)]
    for callback in callbacks:
        if isinstance(callback, SaveBest):
            callback.folder = callback.folder or config.save_folder
    if isinstance(config, Stage1Config):
        callbacks.append(TextMonitor(config.text_encoder.max_length))

    logger_arguments = {name: dict(arguments or {}) for name, arguments in config.loggers.items()}
    if 'tensorboard' in logger_arguments:
        logger_arguments['tensorboard'].setdefault('log_dir', f'{config.save_folder}/tensorboard')
    wandb = logger_arguments.pop('wandb', None)
    loggers: list[LoggerDestination] = build_all('loggers', logger_arguments)
    if config.progress_bar:
        loggers.append(ProgressBar())
    loggers.append(JSONLLogger(Path(config.save_folder, 'metrics.jsonl')))

    check_shared(config.checkpoint_folder)
    checkpoint = None
    if config.autoresume:
        sharded = config.fsdp is not None and config.fsdp.state_dict_type == 'sharded'
        checkpoint = find_checkpoint(config.checkpoint_folder, sharded)
    if config.compile is not None:
        compile_blocks(model, **config.compile)
    trainer = reaching(config.checkpoint_folder)(Trainer)(
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
        accumulate_train_batch_on_tokens=isinstance(config, Stage1Config) and config.objective == 'mntp',
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
        device=open_device(config.device, config.precision),
        precision=config.precision,
        seed=config.seed,
        dist_timeout=config.dist_timeout,
        parallelism_config=None if config.fsdp is None else {'fsdp': fsdp2_config(config.fsdp)},
    )
    if wandb is not None:
        log_to_wandb(trainer, config, wandb, settings.run_id)
    if config.fsdp is not None:
        # Reference cycles keep the unsharded weights alive, which are as large as the model.
        gc.collect()
        sharding = set_up_units(trainer.state.model, config.fsdp)
        if dist.get_global_rank() == 0:
            print(sharding, flush=True)
    if checkpoint is not None and dist.get_global_rank() == 0:
        batch = trainer.state.timestamp.batch.value
        trainer.saved_checkpoints.extend(written_checkpoints(config.checkpoint_folder, batch))
        print(f'{_progress(trainer.state)}, {checkpoint}', flush=True)
    return trainer


def _progress(state: State) -> str:
    """Say from which batch a run resumes, and of how many, if the batches of an epoch are known."""
    batch = state.timestamp.batch.value
    end = state.max_duration
    assert end is not None
    if state.timestamp >= end:
        return f'complete at batch {batch}'
    if end.unit == TimeUnit.BATCH:
        return f'resumes from batch {batch} of {end.value}'
    if end.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return f'resumes from batch {batch} of {end.value * state.dataloader_len.value}'
    return f'resumes from batch {batch}'


def log_to_wandb(trainer: Trainer, config: TrainConfig, arguments: dict[str, Any], run_id: str) -> None:
    """Add Composer's logger for W&B, after the checkpoint is loaded, which names the W&B run to continue."""
    options = {'dir': os.environ.get('WANDB_DIR', config.save_folder), 'resume': 'allow',
               'config': learned_settings(config)}
    if dist.get_global_rank() == 0 and 'WANDB_RUN_ID' not in os.environ:
        options['id'] = run_id
    options.update(arguments.get('init_kwargs', {}))
    logger = build('loggers', 'wandb', arguments | {'init_kwargs': options}, 'loggers.wandb')
    trainer.logger.destinations = (*trainer.logger.destinations, logger)
    trainer.state.callbacks.append(logger)
    logger.init(trainer.state, trainer.logger)


def fit(trainer: Trainer, config: TrainConfig) -> None:
    """Train until `max_duration`; a no-op for a run that has reached it."""
    assert trainer.state.max_duration is not None
    if trainer.state.timestamp >= trainer.state.max_duration:
        return
    if trainer._rng_state is not None:
        trainer.state.callbacks.append(ResumeRandomState(trainer._rng_state))
    if config.eval_first and trainer.state.evaluators and trainer.state.timestamp.batch.value == 0:
        trainer.eval()
    try:
        with reaching(config.checkpoint_folder):
            trainer.fit()
    except BaseException as error:  # torch's CheckpointException is not an Exception
        if is_out_of_shared_memory(error):
            raise  # `run_command` names /dev/shm
        # Checkpoints for an object store are written to a temporary folder first.
        folder = tempfile.gettempdir() if '://' in config.checkpoint_folder else config.checkpoint_folder
        # A sharded checkpoint's error holds those of the ranks; a full one's has no errno.
        causes = [error, *(failure[0] for failure in getattr(error, 'failures', {}).values())]
        is_full = shutil.disk_usage(folder).free < 2**20
        if is_full or errno.ENOSPC in [getattr(cause, 'errno', None) for cause in causes]:
            raise FileError(f'{folder}: no checkpoint can be written, since the disk is full') from error
        raise


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


class ResumeRandomState(Callback):
    """Restore a checkpoint's random state, one per rank, before the first batch of a resumed run.

    Composer 0.32.1 does not do so if the dataset itself resumes in the middle of an epoch, as Streaming's does.
    """

    def __init__(self, rng_state: list[dict[str, Any]]) -> None:
        self._rng_state: Optional[list[dict[str, Any]]] = rng_state

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._rng_state is not None:
            reproducibility.load_rng_state(self._rng_state)
            self._rng_state = None
