# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Names in the YAML files -> objects; the only module that knows every part."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Trainer
from composer.core import TimeUnit
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config

from llm2clip.algorithms.average_gloo_gradients import AverageGlooGradients
from llm2clip.algorithms.clamp_logit_scale import ClampLogitScale
from llm2clip.algorithms.ema import EMA
from llm2clip.algorithms.grad_cache import GradCache
from llm2clip.algorithms.patch_dropout import PatchDropout
from llm2clip.algorithms.step_monitor import StepMonitor
from llm2clip.callbacks.in_batch_accuracy import InBatchAccuracy
from llm2clip.callbacks.jsonl_logger import JSONLLogger
from llm2clip.callbacks.logit_scale_monitor import LogitScaleMonitor
from llm2clip.callbacks.nonfinite import StopAtNonfinite
from llm2clip.callbacks.progress_bar import ProgressBar
from llm2clip.callbacks.resume_random_state import ResumeRandomState
from llm2clip.callbacks.retrieval_grid import RetrievalGrid
from llm2clip.callbacks.save_best import SaveBest
from llm2clip.callbacks.text_monitor import TextMonitor
from llm2clip.checkpoints import find_checkpoint, refuse_code, written_checkpoints
from llm2clip.config import ConfigError, Stage1Config, Stage2Config, TrainConfig
from llm2clip.config_files import save_config
from llm2clip.data.benchmarks import CLASSIFICATION_SETS, RETRIEVAL_SETS
from llm2clip.data.benchmarks.base import ClassificationSet, RetrievalSet
from llm2clip.data.convert.caption_csv import caption_csv
from llm2clip.data.convert.emoji import emoji
from llm2clip.data.convert.huggingface import huggingface
from llm2clip.data.convert.image_folder import image_folder
from llm2clip.data.convert.plain_text import plain_text
from llm2clip.data.convert.table import table
from llm2clip.data.convert.text_pairs import text_pairs
from llm2clip.data.convert.webdataset import webdataset
from llm2clip.data.convert.wikipedia import wikipedia_summaries
from llm2clip.data.streaming import device_batch_size
from llm2clip.models.trainable import TrainableStateModel
from llm2clip.optim import describe_groups, parameter_groups
from llm2clip.sharding import check_sharding

__all__ = [
    'build', 'build_classification_set', 'build_optimizer', 'build_retrieval_set', 'build_source', 'build_trainer',
    'check_train_config', 'fit',
]

SOURCES = {
    'caption_csv': caption_csv,
    'emoji': emoji,
    'huggingface': huggingface,
    'image_folder': image_folder,
    'plain_text': plain_text,
    'table': table,
    'text_pairs': text_pairs,
    'webdataset': webdataset,
    'wikipedia_summaries': wikipedia_summaries,
}

OPTIMIZERS = {
    'adamw': torch.optim.AdamW,
    'decoupled_adamw': composer.optim.DecoupledAdamW,
    'sgd': torch.optim.SGD,
}

SCHEDULERS = {
    'constant': composer.optim.ConstantScheduler,
    'constant_with_warmup': composer.optim.ConstantWithWarmupScheduler,
    'cosine': composer.optim.CosineAnnealingScheduler,
    'cosine_with_warmup': composer.optim.CosineAnnealingWithWarmupScheduler,
    'linear': composer.optim.LinearScheduler,
    'linear_with_warmup': composer.optim.LinearWithWarmupScheduler,
}

ALGORITHMS = {
    'channels_last': composer.algorithms.ChannelsLast,
    'clamp_logit_scale': ClampLogitScale,
    'ema': EMA,
    'grad_cache': GradCache,
    'gradient_clipping': composer.algorithms.GradientClipping,
    'low_precision_groupnorm': composer.algorithms.LowPrecisionGroupNorm,
    'low_precision_layernorm': composer.algorithms.LowPrecisionLayerNorm,
    'patch_dropout': PatchDropout,
}

CALLBACKS = {
    'early_stopper': composer.callbacks.EarlyStopper,
    'in_batch_accuracy': InBatchAccuracy,
    'logit_scale_monitor': LogitScaleMonitor,
    'lr_monitor': composer.callbacks.LRMonitor,
    'memory_monitor': composer.callbacks.MemoryMonitor,
    'optimizer_monitor': composer.callbacks.OptimizerMonitor,
    'retrieval_grid': RetrievalGrid,
    'runtime_estimator': composer.callbacks.RuntimeEstimator,
    'save_best': SaveBest,
    'speed_monitor': composer.callbacks.SpeedMonitor,
    'system_metrics_monitor': composer.callbacks.SystemMetricsMonitor,
}

LOGGERS = {
    'file': composer.loggers.FileLogger,
    'mlflow': composer.loggers.MLFlowLogger,
    'tensorboard': composer.loggers.TensorboardLogger,
    'wandb': composer.loggers.WandBLogger,
}


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'did you mean {near[0]!r}?' if near else f'valid are {", ".join(sorted(names))}'


def check(registry: Mapping[str, Callable[..., Any]], name: Any, arguments: Mapping[str, Any], key: str) -> None:
    """Raise a ConfigError unless `registry` has `name` and its arguments are ones that it takes.

    Args:
        registry: Name -> class.
        name: The chosen name.
        arguments: Keyword arguments from the configuration.
        key: Where the choice stands in the configuration.
    """
    if name not in registry:
        raise ConfigError(f'{key}: there is no {name!r}; {_nearest(str(name), list(registry))}')
    parameters = inspect.signature(registry[name]).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for argument in arguments:
        if argument not in parameters:
            raise ConfigError(f'{key}.{argument}: {name} takes no such argument; '
                              f'{_nearest(argument, list(parameters))}')


def build(registry: Mapping[str, Callable[..., Any]], name: Any, arguments: Mapping[str, Any], key: str) -> Any:
    """Check and construct; the arguments are as for `check`."""
    check(registry, name, arguments, key)
    try:
        return registry[name](**arguments)
    except TypeError as error:
        raise ConfigError(f'{key}: {error}') from None


def _named(component: Mapping[str, Any], key: str) -> tuple[Any, dict[str, Any]]:
    if 'name' not in component:
        raise ConfigError(f'{key}.name: required but not set')
    return component['name'], {k: v for k, v in component.items() if k != 'name'}


def build_source(source: Mapping[str, Any]) -> Any:
    """The splits of a data source and what it left out."""
    return build(SOURCES, *_named(source, 'source'), 'source')


def build_retrieval_set(source: Mapping[str, Any], key: str) -> RetrievalSet:
    """A retrieval benchmark by its name; `key` says where it stands in the configuration."""
    return _open_set(RETRIEVAL_SETS, source, key)


def build_classification_set(source: Mapping[str, Any], key: str) -> ClassificationSet:
    """A set of images with classes, as `build_retrieval_set`."""
    return _open_set(CLASSIFICATION_SETS, source, key)


def _open_set(registry: Mapping[str, Callable[..., Any]], source: Mapping[str, Any], key: str) -> Any:
    name, arguments = _named(source, key)
    try:
        return build(registry, name, arguments, key)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error) if str(error).startswith(key) else f'{key}: {error}') from None


def check_train_config(config: TrainConfig) -> None:
    """Find every error in names, arguments and batch sizes before anything is loaded."""
    check(OPTIMIZERS, *_named(config.optimizer, 'optimizer'), 'optimizer')
    check(SCHEDULERS, *_named(config.scheduler, 'scheduler'), 'scheduler')
    for registry, kind in ((ALGORITHMS, 'algorithms'), (CALLBACKS, 'callbacks'), (LOGGERS, 'loggers')):
        for name, arguments in getattr(config, kind).items():
            check(registry, name, arguments or {}, f'{kind}.{name}')
    if config.fsdp is not None:
        check({'fsdp': FSDP2Config}, 'fsdp', config.fsdp, 'fsdp')
    device_batch = device_batch_size(config.global_train_batch_size, 'global_train_batch_size')
    device_batch_size(config.global_eval_batch_size, 'global_eval_batch_size')
    microbatch = config.device_train_microbatch_size or device_batch
    if not 0 < microbatch <= device_batch:
        raise ConfigError(f'device_train_microbatch_size: {microbatch} is not between 1 and the device batch size, '
                          f'{device_batch}')
    negatives = not isinstance(config, Stage1Config) or config.objective == 'contrastive'
    if negatives and microbatch < device_batch and 'grad_cache' not in config.algorithms:
        raise ConfigError(
            f'device_train_microbatch_size: {microbatch} is not the device batch size, {device_batch}. A contrastive '
            'loss on a microbatch would only see the negatives inside it. Add `algorithms: {grad_cache: {}}`, which '
            'keeps the loss that of the global batch, or leave the key out, or lower global_train_batch_size.')
    if not negatives and 'grad_cache' in config.algorithms:
        raise ConfigError('algorithms.grad_cache: objective mntp has no negatives; its microbatches need no cache')
    if isinstance(config, Stage1Config):
        _check_stage1(config)
    elif (isinstance(config, Stage2Config) and config.model.vision.gradient_checkpointing
          and (config.fsdp or {}).get('activation_checkpointing')):
        raise ConfigError('fsdp.activation_checkpointing: model.vision.gradient_checkpointing recomputes the same '
                          'blocks already; set one of the two to false')


def _check_stage1(config: Stage1Config) -> None:
    if config.objective not in ('contrastive', 'mntp'):
        raise ConfigError(f'objective: {config.objective!r} is neither contrastive nor mntp')
    if config.fsdp is not None and config.text_encoder.dtype != 'float32':
        raise ConfigError(f'text_encoder.dtype: {config.text_encoder.dtype} does not go with fsdp, which needs the '
                          'float32 of the LoRA weights everywhere; precision: amp_bf16 computes in bfloat16')
    if config.loss_scale <= 0:
        raise ConfigError(f'loss_scale: {config.loss_scale} is not above 0')
    if config.objective == 'mntp' and config.eval_data is not None:
        raise ConfigError('eval_data: objective mntp has no evaluation')


def build_optimizer(
    config: Mapping[str, Any],
    model: torch.nn.Module,
    lr_scale: Optional[Mapping[str, float]] = None,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups` of the model; rank 0 prints them."""
    name, arguments = _named(config, 'optimizer')
    check(OPTIMIZERS, name, arguments, 'optimizer')
    lr, weight_decay = arguments.pop('lr'), arguments.pop('weight_decay', 0.0)
    groups = parameter_groups(model, lr, weight_decay, lr_scale, layer_decay)
    if dist.get_global_rank() == 0:
        print(describe_groups(model, groups), flush=True)
    if 'betas' in arguments:
        arguments['betas'] = tuple(arguments['betas'])
    return OPTIMIZERS[name](groups, lr=lr, **arguments)


def _build_all(registry: Mapping[str, Callable[..., Any]], chosen: Mapping[str, Any], kind: str) -> list[Any]:
    return [build(registry, name, arguments or {}, f'{kind}.{name}') for name, arguments in chosen.items()]


def build_trainer(
    config: TrainConfig,
    model: ComposerModel,
    optimizer: torch.optim.Optimizer,
    train_data: DataSpec,
    evaluators: Union[Sequence[Evaluator], Evaluator, None] = None,
    more_algorithms: Sequence[Algorithm] = (),
) -> Trainer:
    """Composer's Trainer as the configuration says; writes the resolved configuration into the run's folder.

    `more_algorithms` come after those of the configuration.
    """
    if dist.get_global_rank() == 0:
        save_config(config, config.save_folder)
    algorithms: list[Algorithm] = _build_all(ALGORITHMS, config.algorithms, 'algorithms')
    for algorithm in algorithms:
        if isinstance(algorithm, GradCache):
            algorithm.split_batch = train_data.split_batch
    # Composer runs the algorithms of an `after_…` event last to first: gradients are averaged, then measured, then
    # clipped.
    algorithms += [*more_algorithms, StepMonitor(), AverageGlooGradients()]
    callbacks: list[Callback] = [
        *_build_all(CALLBACKS, config.callbacks, 'callbacks'), StopAtNonfinite(config.checkpoint_folder)]
    for callback in callbacks:
        if isinstance(callback, SaveBest):
            callback.folder = callback.folder or config.save_folder
    mntp = isinstance(config, Stage1Config) and config.objective == 'mntp'
    if isinstance(config, Stage1Config):
        callbacks.append(TextMonitor(config.text_encoder.max_length))
    loggers: list[LoggerDestination] = _build_all(LOGGERS, config.loggers, 'loggers')
    if config.progress_bar:
        loggers.append(ProgressBar())
        # The Trainer would rather make one of its own.
        warnings.filterwarnings('ignore', 'Specifying the ProgressBarLogger via')
    loggers.append(JSONLLogger(Path(config.save_folder, 'metrics.jsonl')))
    checkpoint = _resume_from(config) if config.autoresume else None
    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        schedulers=build(SCHEDULERS, *_named(config.scheduler, 'scheduler'), 'scheduler'),
        train_dataloader=train_data,
        eval_dataloader=evaluators,
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=loggers,
        run_name=config.run_name,
        max_duration=config.max_duration,
        device_train_microbatch_size=config.device_train_microbatch_size,
        # MNTP's loss is a mean over masked tokens, which microbatches and ranks have different numbers of.
        accumulate_train_batch_on_tokens=mntp,
        # `TrainableStateModel` checks its weights itself.
        load_strict_model_weights=not isinstance(model, TrainableStateModel),
        eval_interval=config.eval_interval,
        save_folder=config.checkpoint_folder,
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        # A run that was killed while it wrote a checkpoint leaves one behind that it does not resume from.
        save_overwrite=config.autoresume,
        load_path=checkpoint,
        progress_bar=False,
        log_to_console=config.log_to_console,
        console_log_interval=config.console_log_interval,
        device=config.device,
        precision=config.precision,
        seed=config.seed,
        dist_timeout=config.dist_timeout,
        parallelism_config={'fsdp': FSDP2Config(**config.fsdp)} if config.fsdp is not None else None,
    )
    if config.fsdp is not None:
        sharding = check_sharding(trainer.state.model, bool(config.fsdp.get('activation_checkpointing')))
        if dist.get_global_rank() == 0:
            print(sharding, flush=True)
    if checkpoint is not None and dist.get_global_rank() == 0:
        batch = trainer.state.timestamp.batch.value
        trainer.saved_checkpoints.extend(written_checkpoints(config.checkpoint_folder, batch))
        print(f'{_progress(trainer)}, {checkpoint}', flush=True)
    return trainer


def _progress(trainer: Trainer) -> str:
    """Where a run goes on."""
    done, end, state = trainer.state.timestamp, trainer.state.max_duration, trainer.state
    assert end is not None
    if done >= end:
        return f'complete at batch {done.batch.value}'
    steps = end.value if end.unit == TimeUnit.BATCH else None
    if end.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        steps = end.value * state.dataloader_len.value
    return f'goes on from batch {done.batch.value}' + (f' of {steps}' if steps is not None else '')


def _resume_from(config: TrainConfig) -> Optional[str]:
    refuse_code()
    sharded = config.fsdp is not None and FSDP2Config(**config.fsdp).state_dict_type == 'sharded'
    return find_checkpoint(config.checkpoint_folder, sharded)


def fit(trainer: Trainer) -> None:
    """Train until `max_duration`; a run that has reached it is left as it is."""
    assert trainer.state.max_duration is not None
    if trainer.state.timestamp >= trainer.state.max_duration:
        return
    if trainer._rng_state is not None:
        trainer.state.callbacks.append(ResumeRandomState(trainer._rng_state))
    trainer.fit()
