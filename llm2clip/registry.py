# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Names in YAML files -> parts, which are imported only when they are used.

A part is a small module and a line here.  Its arguments in a YAML file are those of its class or function.
Instead of a name, ``module:class`` selects a part in a module on the Python path or in the current folder.
"""

import importlib
import inspect
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llm2clip.config.loading import check_values
from llm2clip.config.ranges import Positive, TimeOrZero
from llm2clip.errors import ConfigError, nearest, under

# Name -> ``module:class`` (or function).
_Registry = Mapping[str, str]

SOURCES: _Registry = {
    'caption_csv': 'llm2clip.data.convert.image_folder:caption_csv',
    'coco': 'llm2clip.data.convert.flickr_coco:coco',
    'coco_cn': 'llm2clip.data.convert.flickr_coco:coco_cn',
    'docci': 'llm2clip.data.convert.retrieval_benchmarks:docci',
    'emoji': 'llm2clip.data.convert.emoji:emoji',
    'flickr30k': 'llm2clip.data.convert.flickr_coco:flickr30k',
    'flickr8k': 'llm2clip.data.convert.flickr_coco:flickr8k',
    'flickr_cn': 'llm2clip.data.convert.flickr_coco:flickr_cn',
    'huggingface': 'llm2clip.data.convert.table:huggingface',
    'image_folder': 'llm2clip.data.convert.image_folder:image_folder',
    'plain_text': 'llm2clip.data.convert.text_pairs:plain_text',
    'sharegpt4v': 'llm2clip.data.convert.retrieval_benchmarks:sharegpt4v',
    'table': 'llm2clip.data.convert.table:table',
    'text_pairs': 'llm2clip.data.convert.text_pairs:text_pairs',
    'urban1k': 'llm2clip.data.convert.retrieval_benchmarks:urban1k',
    'webdataset': 'llm2clip.data.convert.img2dataset:webdataset',
    'wikipedia_summaries': 'llm2clip.data.convert.text_pairs:wikipedia_summaries',
    'xm3600': 'llm2clip.data.convert.retrieval_benchmarks:xm3600',
}

CLASSIFICATION_SETS: _Registry = {
    'clip_benchmark': 'llm2clip.data.classification_sets:clip_benchmark',
    'imagenet_folder': 'llm2clip.data.classification_sets:imagenet_folder',
}

OPTIMIZERS: _Registry = {
    'adamw': 'torch.optim:AdamW',
    'decoupled_adamw': 'composer.optim:DecoupledAdamW',
    'sgd': 'torch.optim:SGD',
}

SCHEDULERS: _Registry = {
    'constant': 'composer.optim:ConstantScheduler',
    'constant_with_warmup': 'composer.optim:ConstantWithWarmupScheduler',
    'cosine': 'composer.optim:CosineAnnealingScheduler',
    'cosine_with_warmup': 'composer.optim:CosineAnnealingWithWarmupScheduler',
    'linear': 'composer.optim:LinearScheduler',
    'linear_with_warmup': 'composer.optim:LinearWithWarmupScheduler',
}

ALGORITHMS: _Registry = {
    'channels_last': 'composer.algorithms:ChannelsLast',
    'clamp_logit_scale': 'llm2clip.training.algorithms.weights:ClampLogitScale',
    'grad_cache': 'llm2clip.training.algorithms.grad_cache:GradCache',
    'gradient_clipping': 'composer.algorithms:GradientClipping',
    'patch_dropout': 'llm2clip.training.algorithms.batches:PatchDropout',
}

CALLBACKS: _Registry = {
    'lr_monitor': 'composer.callbacks:LRMonitor',
    'memory_monitor': 'composer.callbacks:MemoryMonitor',
    'runtime_estimator': 'composer.callbacks:RuntimeEstimator',
    'save_best': 'llm2clip.training.callbacks.monitors:SaveBest',
    'speed_monitor': 'composer.callbacks:SpeedMonitor',
    'system_metrics_monitor': 'composer.callbacks:SystemMetricsMonitor',
}

LOGGERS: _Registry = {
    'file': 'composer.loggers:FileLogger',
    'mlflow': 'composer.loggers:MLFlowLogger',
    'tensorboard': 'composer.loggers:TensorboardLogger',
    'wandb': 'composer.loggers:WandBLogger',
}

# Key of the configuration -> its valid names.
PARTS: Mapping[str, _Registry] = {
    'source': SOURCES, 'optimizer': OPTIMIZERS, 'scheduler': SCHEDULERS, 'algorithms': ALGORITHMS,
    'callbacks': CALLBACKS, 'loggers': LOGGERS, 'zeroshot': CLASSIFICATION_SETS,
    'linear_probe': CLASSIFICATION_SETS,
}
# Key of the configuration -> the base class of its parts.  Sources and classification sets are functions.
_BASES: _Registry = {
    'optimizer': 'torch.optim:Optimizer', 'scheduler': 'composer.optim:ComposerScheduler',
    'algorithms': 'composer:Algorithm', 'callbacks': 'composer:Callback',
    'loggers': 'composer.loggers:LoggerDestination', 'loss': 'torch.nn:Module',
}
# Types of arguments that other libraries' parts need but do not declare in their signatures.
_RANGES: Mapping[str, Mapping[str, Any]] = {
    'gradient_clipping': {'clipping_type': typing.Literal['adaptive', 'norm', 'value'],
                          'clipping_threshold': Positive},
}


def find(reference: str) -> Callable[..., Any]:
    """Import the part behind ``module:class``."""
    module, name = reference.split(':')
    return getattr(importlib.import_module(module), name)


def _reference(kind: str, name: str) -> str:
    """Return the ``module:class`` of a name, or the name itself if it has that form."""
    if name in PARTS.get(kind, ()):
        return PARTS[kind][name]
    if re.fullmatch(r'\w[\w.]*:\w+', name) is None:
        raise ConfigError(f'there is no {name!r}; {nearest(name, PARTS[kind])}')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a launched script, Python adds only the folder of the script
    return name


def named(component: Mapping[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of the part at `key` that is written ``{name: …, argument: …}``."""
    if 'name' not in component:
        raise ConfigError('required but not set', key=f'{key}.name')
    arguments = dict(component)
    return str(arguments.pop('name')), arguments


def check_names(config: Any) -> None:
    """Import the modules of the user, and raise a ConfigError for an unknown name of a part.  Parts are not
    imported, because that takes seconds."""
    for i, module in enumerate(config.modules):
        sys.path.append(os.getcwd())
        with _errors_as_config_errors(f'{module}:', f'modules[{i}]'):
            importlib.import_module(module)
    for key in ('source', 'optimizer', 'scheduler'):
        if hasattr(config, key):
            name, _ = named(getattr(config, key), key)
            with under(key):
                _reference(key, name)
    for key in ('algorithms', 'callbacks', 'loggers'):
        for name in getattr(config, key, {}):
            with under(f'{key}.{name}'):
                _reference(key, name)


def argument_types(part: Callable[..., Any]) -> dict[str, Any]:
    """Return argument -> type with its range, of a part; empty if the types exist for type checkers only."""
    function = part.__init__ if isinstance(part, type) else part
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        return {}


def check_arguments(part: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ConfigError for an argument that `part`, called `name` in the configuration, does not take, or
    a value of the wrong type or out of range."""
    parameters = inspect.signature(part).parameters
    takes_any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    types = argument_types(part) | dict(_RANGES.get(name, {}))
    for argument, value in arguments.items():
        if not takes_any_name and argument not in parameters:
            raise ConfigError(f'{name} takes no such argument; {nearest(argument, parameters)}',
                              key=argument)
        if argument not in types:
            continue
        options = [types[argument], *typing.get_args(types[argument])]
        takes_tuple = any(typing.get_origin(option) is tuple for option in options)
        takes_time = any(hasattr(option, 'from_timestring') for option in options)  # Composer's Time
        if takes_tuple and isinstance(value, list):
            value = tuple(value)  # YAML has no tuples
        with under(argument):
            check_values(types[argument], value, strict=True)
            if takes_time and isinstance(value, str):
                check_values(TimeOrZero, value)


def check(kind: str, name: str, arguments: Mapping[str, Any], key: str = '') -> Callable[..., Any]:
    """Return the part called `name`, or a ``module:class`` itself; raise a ConfigError if it does not exist
    or does not take these arguments.

    `kind` is a key of `PARTS`; `key` is the place of the name in the configuration, by default `kind`.
    """
    with under(key or kind):
        reference = _reference(kind, name)
        with _errors_as_config_errors(name):
            part = find(reference)
        module = reference.partition(':')[0]
        expected = 'a function that a module of yours defines'
        is_valid = inspect.isfunction(part) and part.__module__ == module
        if kind in _BASES:
            base: Any = find(_BASES[kind])
            expected = f'a subclass of {_BASES[kind]}'
            is_valid = isinstance(part, type) and issubclass(part, base)
        # The standard library has no parts, but functions that a file must not call.
        if not is_valid or module.partition('.')[0] in sys.stdlib_module_names:
            raise ConfigError(f'{reference}, expected {expected}')
        check_arguments(part, name, arguments)
    return part


@contextmanager
def _errors_as_config_errors(name: str, key: str = '') -> Iterator[None]:
    """Turn errors while a part is imported or constructed, and exits of ``module:class``,
    into ConfigErrors with `key`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        module, is_of_user, _ = name.partition(':')
        is_expected = is_of_user or isinstance(error, (TypeError, ValueError, ImportError))
        if type(error).__module__.startswith('llm2clip.') or not is_expected:
            raise
        line = ''
        for frame, number in traceback.walk_tb(error.__traceback__):
            if frame.f_globals.get('__name__') == module:
                line = f'{frame.f_code.co_filename}:{number}: {type(error).__name__}: '
        raise ConfigError(line + ' '.join(str(error).split()), key=key) from error


def build(kind: str, name: str, arguments: Mapping[str, Any], key: str = '') -> Any:
    """Check and construct a part; arguments and errors as for `check`."""
    part = check(kind, name, arguments, key)
    with _errors_as_config_errors(name, key or kind):
        return part(**arguments)


def build_all(kind: str, chosen: Mapping[str, Any]) -> list[Any]:
    """Build the parts of a mapping name -> arguments."""
    return [build(kind, name, arguments or {}, f'{kind}.{name}') for name, arguments in chosen.items()]


def build_source(source: Mapping[str, Any]) -> Any:
    """Build a data source: its splits, and the samples that it left out."""
    return build('source', *named(source, 'source'))


def open_set(kind: str, source: Mapping[str, Any], key: str) -> Any:
    """Build a classification set of a kind: ``zeroshot`` or ``linear_probe``.

    `source` has its ``name`` and arguments, and is at `key`.  Raise a ConfigError if there is no such set or
    its layout is wrong, and an OSError or a FileError if files are missing or damaged.
    """
    name, arguments = named(source, key)
    part = check(kind, name, arguments, key)
    with _errors_as_config_errors(name, key), under(key):
        return part(**arguments)
