# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Names in the YAML files -> parts, imported only when they are asked for.

A part is a small module of its own and a line here.  Its arguments in a YAML file are those of its class or function.
"""

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm2clip.config import ConfigError
from llm2clip.config.files import check_values
from llm2clip.config.ranges import Positive

if TYPE_CHECKING:
    from llm2clip.evaluation.sets.files import ClassificationSet, CompositionSet, RetrievalSet

__all__ = [
    'ALGORITHMS', 'CALLBACKS', 'CLASSIFICATION_SETS', 'COMPOSITION_SETS', 'LOGGERS', 'OPTIMIZERS', 'RETRIEVAL_SETS',
    'Registry', 'SCHEDULERS', 'SOURCES', 'build', 'build_all', 'build_classification_set', 'build_composition_set',
    'build_retrieval_set', 'build_source', 'check', 'check_arguments', 'find', 'named',
]

Registry = Mapping[str, str]
"""Name -> ``module:class`` (or function)."""

SOURCES: Registry = {
    'caption_csv': 'llm2clip.data.convert.image_folder:caption_csv',
    'coco': 'llm2clip.data.convert.published:coco',
    'emoji': 'llm2clip.data.convert.emoji:emoji',
    'flickr30k': 'llm2clip.data.convert.published:flickr30k',
    'flickr8k': 'llm2clip.data.convert.published:flickr8k',
    'huggingface': 'llm2clip.data.convert.table:huggingface',
    'image_folder': 'llm2clip.data.convert.image_folder:image_folder',
    'plain_text': 'llm2clip.data.convert.texts:plain_text',
    'table': 'llm2clip.data.convert.table:table',
    'text_pairs': 'llm2clip.data.convert.texts:text_pairs',
    'webdataset': 'llm2clip.data.convert.img2dataset:webdataset',
    'wikipedia_summaries': 'llm2clip.data.convert.texts:wikipedia_summaries',
}

RETRIEVAL_SETS: Registry = {
    'coco': 'llm2clip.evaluation.sets.karpathy:coco',
    'coco_cn': 'llm2clip.evaluation.sets.languages:coco_cn',
    'docci': 'llm2clip.evaluation.sets.long_captions:docci',
    'flickr30k': 'llm2clip.evaluation.sets.karpathy:flickr30k',
    'flickr8k': 'llm2clip.evaluation.sets.karpathy:flickr8k',
    'flickr_cn': 'llm2clip.evaluation.sets.languages:flickr_cn',
    'image_folder': 'llm2clip.evaluation.sets.generic:image_folder',
    'mds': 'llm2clip.evaluation.sets.generic:mds',
    'sharegpt4v': 'llm2clip.evaluation.sets.long_captions:sharegpt4v',
    'urban1k': 'llm2clip.evaluation.sets.long_captions:urban1k',
    'xm3600': 'llm2clip.evaluation.sets.languages:xm3600',
}

CLASSIFICATION_SETS: Registry = {
    'clip_benchmark': 'llm2clip.evaluation.sets.clip_benchmark:clip_benchmark',
    'imagenet_folder': 'llm2clip.evaluation.sets.classification:imagenet_folder',
}

COMPOSITION_SETS: Registry = {
    'aro_attribution': 'llm2clip.evaluation.sets.composition:aro_attribution',
    'aro_relation': 'llm2clip.evaluation.sets.composition:aro_relation',
    'sugarcrepe': 'llm2clip.evaluation.sets.composition:sugarcrepe',
    'winoground': 'llm2clip.evaluation.sets.composition:winoground',
}

OPTIMIZERS: Registry = {
    'adamw': 'torch.optim:AdamW',
    'decoupled_adamw': 'composer.optim:DecoupledAdamW',
    'sgd': 'torch.optim:SGD',
}

SCHEDULERS: Registry = {
    'constant': 'composer.optim:ConstantScheduler',
    'constant_with_warmup': 'composer.optim:ConstantWithWarmupScheduler',
    'cosine': 'composer.optim:CosineAnnealingScheduler',
    'cosine_with_warmup': 'composer.optim:CosineAnnealingWithWarmupScheduler',
    'linear': 'composer.optim:LinearScheduler',
    'linear_with_warmup': 'composer.optim:LinearWithWarmupScheduler',
}

ALGORITHMS: Registry = {
    'channels_last': 'composer.algorithms:ChannelsLast',
    'clamp_logit_scale': 'llm2clip.training.algorithms.clamp_logit_scale:ClampLogitScale',
    'ema': 'llm2clip.training.algorithms.ema:EMA',
    'grad_cache': 'llm2clip.training.algorithms.grad_cache:GradCache',
    'gradient_clipping': 'composer.algorithms:GradientClipping',
    'low_precision_groupnorm': 'composer.algorithms:LowPrecisionGroupNorm',
    'low_precision_layernorm': 'composer.algorithms:LowPrecisionLayerNorm',
    'patch_dropout': 'llm2clip.training.algorithms.patch_dropout:PatchDropout',
}

CALLBACKS: Registry = {
    'early_stopper': 'composer.callbacks:EarlyStopper',
    'in_batch_accuracy': 'llm2clip.training.callbacks.in_batch_accuracy:InBatchAccuracy',
    'logit_scale_monitor': 'llm2clip.training.callbacks.logit_scale_monitor:LogitScaleMonitor',
    'lr_monitor': 'composer.callbacks:LRMonitor',
    'memory_monitor': 'composer.callbacks:MemoryMonitor',
    'optimizer_monitor': 'composer.callbacks:OptimizerMonitor',
    'retrieval_grid': 'llm2clip.training.callbacks.retrieval_grid:RetrievalGrid',
    'runtime_estimator': 'composer.callbacks:RuntimeEstimator',
    'save_best': 'llm2clip.training.callbacks.save_best:SaveBest',
    'speed_monitor': 'llm2clip.training.callbacks.speed_monitor:SpeedMonitor',
    'system_metrics_monitor': 'composer.callbacks:SystemMetricsMonitor',
}

LOGGERS: Registry = {
    'file': 'composer.loggers:FileLogger',
    'mlflow': 'composer.loggers:MLFlowLogger',
    'tensorboard': 'composer.loggers:TensorboardLogger',
    'wandb': 'composer.loggers:WandBLogger',
}


# Of other libraries' parts whose signatures say less than their code asks for.
_RANGES: Mapping[str, Mapping[str, Any]] = {
    'gradient_clipping': {'clipping_type': typing.Literal['adaptive', 'norm', 'value'], 'clipping_threshold': Positive},
}


def find(reference: str) -> Callable[..., Any]:
    """The part behind ``module:class``."""
    module, name = reference.split(':')
    return getattr(importlib.import_module(module), name)


def nearest(name: str, names: Sequence[str]) -> str:
    """A hint at what may have been meant, for the end of a message."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'did you mean {near[0]!r}?' if near else f'valid are {", ".join(sorted(names))}'


def check_arguments(part: Callable[..., Any], name: str, arguments: Mapping[str, Any], key: str) -> None:
    """Raise a ConfigError at an argument that `part`, called `name` in the configuration, does not take, or whose value
    is not of the type in its signature or not in the range beside that."""
    parameters = inspect.signature(part).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    hints = {**_type_hints(part), **_RANGES.get(name, {})}
    for argument, value in arguments.items():
        if argument not in parameters and not any_name:
            raise ConfigError(f'{key}.{argument}: {name} takes no such argument; '
                              f'{nearest(argument, list(parameters))}')
        if argument in hints:
            # YAML has no tuples.
            tuples = 'tuple' in str(hints[argument]) and isinstance(value, list)
            check_values(hints[argument], tuple(value) if tuples else value, f'{key}.{argument}', strict=True)
            _check_time(hints[argument], value, f'{key}.{argument}')


def _type_hints(part: Callable[..., Any]) -> dict[str, Any]:
    """Of its arguments; none if they use names that exist for type checkers only."""
    try:
        return typing.get_type_hints(part.__init__ if isinstance(part, type) else part, include_extras=True)
    except NameError:
        return {}


def _check_time(hint: Any, value: Any, key: str) -> None:
    """Raise a ConfigError if a text stands for one of Composer's times, and is none."""
    for kind in typing.get_args(hint):
        if isinstance(value, str) and hasattr(kind, 'from_timestring'):
            try:
                kind.from_timestring(value)
            except (ValueError, TypeError, AssertionError):
                raise ConfigError(f'{key}: {value!r}, expected a time, such as 1ep, 20ba or 0.1dur') from None


def check(registry: Registry, name: Any, arguments: Mapping[str, Any], key: str) -> None:
    """Raise a ConfigError unless `registry` has `name` and its arguments are ones that it takes.

    Args:
        registry: Where the name is looked up.
        name: The chosen name.
        arguments: Keyword arguments from the configuration.
        key: Where the choice stands in the configuration.
    """
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f'{key}: there is no {name!r}; {nearest(str(name), list(registry))}')
    check_arguments(find(registry[name]), name, arguments, key)


def build(registry: Registry, name: Any, arguments: Mapping[str, Any], key: str) -> Any:
    """Check and construct; the arguments are as for `check`."""
    check(registry, name, arguments, key)
    try:
        return find(registry[name])(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        if type(error).__module__.startswith('llm2clip.'):
            raise
        raise ConfigError(f'{key}: {error}') from error


def named(component: Mapping[str, Any], key: str) -> tuple[Any, dict[str, Any]]:
    """Name and arguments of a part that is written ``{name: …, argument: …}``."""
    if 'name' not in component:
        raise ConfigError(f'{key}.name: required but not set')
    return component['name'], {k: v for k, v in component.items() if k != 'name'}


def build_all(registry: Registry, chosen: Mapping[str, Any], key: str) -> list[Any]:
    """The parts of a mapping name -> arguments."""
    return [build(registry, name, arguments or {}, f'{key}.{name}') for name, arguments in chosen.items()]


def build_source(source: Mapping[str, Any]) -> Any:
    """The splits of a data source and what it left out."""
    return build(SOURCES, *named(source, 'source'), 'source')


def build_retrieval_set(source: Mapping[str, Any], key: str) -> 'RetrievalSet':
    """A set of images with captions by its name; `key` says where it stands in the configuration."""
    return _open_set(RETRIEVAL_SETS, source, key)


def build_classification_set(source: Mapping[str, Any], key: str) -> 'ClassificationSet':
    """A set of images with classes, as `build_retrieval_set`."""
    return _open_set(CLASSIFICATION_SETS, source, key)


def build_composition_set(source: Mapping[str, Any], key: str) -> 'CompositionSet':
    """A set of images with texts that are much alike, as `build_retrieval_set`."""
    return _open_set(COMPOSITION_SETS, source, key)


def _open_set(registry: Registry, source: Mapping[str, Any], key: str) -> Any:
    name, arguments = named(source, key)
    try:
        return build(registry, name, arguments, key)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error) if str(error).startswith(key) else f'{key}: {error}') from None
