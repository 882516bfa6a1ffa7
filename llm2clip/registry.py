# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Names in YAML files -> parts, which are imported only when they are used.

A part is a small module of its own and a line here.  Its arguments in a YAML file are those of its class or function.
Instead of a name, ``module:class`` selects a part in a module on the Python path or in the current folder.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.config.files import check_values
from llm2clip.config.ranges import Positive

__all__ = [
    'PARTS', 'argument_types', 'build', 'build_all', 'build_source', 'check', 'check_arguments', 'check_names', 'named',
    'open_set',
]

# Name -> ``module:class`` (or function).
_Registry = Mapping[str, str]

SOURCES: _Registry = {
    'caption_csv': 'llm2clip.data.convert.image_folder:caption_csv',
    'coco': 'llm2clip.data.convert.image_folder:coco',
    'emoji': 'llm2clip.data.convert.emoji:emoji',
    'flickr30k': 'llm2clip.data.convert.image_folder:flickr30k',
    'flickr8k': 'llm2clip.data.convert.image_folder:flickr8k',
    'hard_negatives': 'llm2clip.teacher.hard_negatives:hard_negatives',
    'huggingface': 'llm2clip.data.convert.table:huggingface',
    'image_folder': 'llm2clip.data.convert.image_folder:image_folder',
    'plain_text': 'llm2clip.data.convert.texts:plain_text',
    'table': 'llm2clip.data.convert.table:table',
    'text_pairs': 'llm2clip.data.convert.texts:text_pairs',
    'webdataset': 'llm2clip.data.convert.img2dataset:webdataset',
    'wikipedia_summaries': 'llm2clip.data.convert.texts:wikipedia_summaries',
}

RETRIEVAL_SETS: _Registry = {
    'coco': 'llm2clip.evaluation.sets.retrieval:coco',
    'coco_cn': 'llm2clip.evaluation.sets.retrieval:coco_cn',
    'docci': 'llm2clip.evaluation.sets.retrieval:docci',
    'flickr30k': 'llm2clip.evaluation.sets.retrieval:flickr30k',
    'flickr8k': 'llm2clip.evaluation.sets.retrieval:flickr8k',
    'flickr_cn': 'llm2clip.evaluation.sets.retrieval:flickr_cn',
    'image_folder': 'llm2clip.evaluation.sets.retrieval:image_folder',
    'mds': 'llm2clip.evaluation.sets.retrieval:mds',
    'sharegpt4v': 'llm2clip.evaluation.sets.retrieval:sharegpt4v',
    'urban1k': 'llm2clip.evaluation.sets.retrieval:urban1k',
    'xm3600': 'llm2clip.evaluation.sets.retrieval:xm3600',
}

CLASSIFICATION_SETS: _Registry = {
    'clip_benchmark': 'llm2clip.evaluation.sets.classification:clip_benchmark',
    'imagenet_folder': 'llm2clip.evaluation.sets.classification:imagenet_folder',
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
    'ema': 'llm2clip.training.algorithms.weights:EMA',
    'grad_cache': 'llm2clip.training.algorithms.grad_cache:GradCache',
    'gradient_clipping': 'composer.algorithms:GradientClipping',
    'patch_dropout': 'llm2clip.training.algorithms.batches:PatchDropout',
}

CALLBACKS: _Registry = {
    'logit_scale_monitor': 'llm2clip.training.callbacks.monitors:LogitScaleMonitor',
    'lr_monitor': 'composer.callbacks:LRMonitor',
    'memory_monitor': 'composer.callbacks:MemoryMonitor',
    'optimizer_monitor': 'composer.callbacks:OptimizerMonitor',
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
    'callbacks': CALLBACKS, 'loggers': LOGGERS, 'retrieval': RETRIEVAL_SETS, 'zeroshot': CLASSIFICATION_SETS,
    'linear_probe': CLASSIFICATION_SETS,
}
# Types of arguments that other libraries' parts need but do not declare in their signatures.
_RANGES: Mapping[str, Mapping[str, Any]] = {
    'gradient_clipping': {'clipping_type': typing.Literal['adaptive', 'norm', 'value'], 'clipping_threshold': Positive},
}


def find(reference: str) -> Callable[..., Any]:
    """Import the part behind ``module:class``."""
    module, name = reference.split(':')
    return getattr(importlib.import_module(module), name)


def _reference(kind: str, name: Any, key: str) -> str:
    """Return the ``module:class`` of a name, or the name itself if it has that form."""
    if str(name) in PARTS[kind]:
        return PARTS[kind][name]
    if re.fullmatch(r'\w[\w.]*:\w+', str(name)) is None:
        raise ConfigError(f'{key}: there is no {name!r}; {_nearest(str(name), PARTS[kind])}')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a launched script, Python adds only the folder of the script
    return name


def _nearest(name: str, names: Collection[str]) -> str:
    """Return the end of a message: the most similar valid name, or all of them."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'did you mean {near[0]!r}?' if near else f'valid are {", ".join(sorted(names))}'


def named(component: Mapping[str, Any], key: str) -> tuple[Any, dict[str, Any]]:
    """Return the name and the arguments of a part that is written ``{name: …, argument: …}``."""
    if 'name' not in component:
        raise ConfigError(f'{key}.name: required but not set')
    return component['name'], {k: v for k, v in component.items() if k != 'name'}


def check_names(config: Any) -> None:
    """Raise a ConfigError for an unknown name, or an argument that its part does not take.  Only the parts' source is
    read, because importing them takes seconds."""
    parts = [(key, *named(getattr(config, key), key), key) for key in ('source', 'optimizer', 'scheduler')
             if hasattr(config, key)]
    parts += [(key, name, arguments or {}, f'{key}.{name}') for key in ('algorithms', 'callbacks', 'loggers')
              for name, arguments in getattr(config, key, {}).items()]
    for kind, name, arguments, key in parts:
        taken = _arguments_in_source(_reference(kind, name, key), key)
        if taken is not None:
            for argument in arguments:
                _check_argument(argument, taken, name, key)


def _arguments_in_source(reference: str, key: str) -> Optional[list[str]]:
    """Return the arguments of ``module:class`` or function; None if its source does not show all of them."""
    module, name = reference.split(':')
    package, *inside = module.split('.')
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ConfigError(f'{key}: there is no module {package!r} on the Python path or in the current folder')
    path = Path(spec.origin or '').parent.joinpath(*inside) if inside else Path(spec.origin or '')
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    for node in ast.parse(path.read_bytes(), str(path)).body if path.is_file() else ():
        if isinstance(node, ast.ImportFrom) and not node.level and any(
                alias.name == name and alias.asname in (None, name) for alias in node.names):
            return _arguments_in_source(f'{node.module}:{name}', key)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            functions = node.body if isinstance(node, ast.ClassDef) else [node]
            call = next((one.args for one in functions
                         if isinstance(one, ast.FunctionDef) and one.name in ('__init__', name)), None)
            if call is not None and call.kwarg is None:
                return [one.arg for one in (*call.posonlyargs, *call.args, *call.kwonlyargs) if one.arg != 'self']
    return None


def _check_argument(argument: str, names: Collection[str], part: str, key: str) -> None:
    if argument not in names:
        raise ConfigError(f'{key}.{argument}: {part} takes no such argument; {_nearest(argument, names)}')


def argument_types(part: Callable[..., Any]) -> dict[str, Any]:
    """Return argument -> type with its range, of a part; empty if the types exist for type checkers only."""
    try:
        return typing.get_type_hints(part.__init__ if isinstance(part, type) else part, include_extras=True)
    except NameError:
        return {}


def check_arguments(part: Callable[..., Any], name: str, arguments: Mapping[str, Any], key: str) -> None:
    """Raise a ConfigError for an argument that `part`, called `name` in the configuration, does not take, or a value of
    the wrong type or out of range."""
    parameters = inspect.signature(part).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    hints = {**argument_types(part), **_RANGES.get(name, {})}
    for argument, value in arguments.items():
        if not any_name:
            _check_argument(argument, parameters, name, key)
        if argument not in hints:
            continue
        # YAML has no tuples.
        tuples = 'tuple' in str(hints[argument]) and isinstance(value, list)
        check_values(hints[argument], tuple(value) if tuples else value, f'{key}.{argument}', strict=True)
        for kind in typing.get_args(hints[argument]):
            if isinstance(value, str) and hasattr(kind, 'from_timestring'):  # Composer's Time
                try:
                    kind.from_timestring(value)
                except (ValueError, TypeError, AssertionError):
                    raise ConfigError(f'{key}.{argument}: {value!r}, expected a time, such as 1ep, 20ba or '
                                      '0.1dur') from None


def check(kind: str, name: Any, arguments: Mapping[str, Any], key: str = '') -> Callable[..., Any]:
    """Return the part called `name`, or a ``module:class`` itself; raise a ConfigError if it does not exist or does not
    take these arguments.

    `kind` is a key of `PARTS`; `key` is the place of the name in the configuration, by default `kind`.
    """
    key = key or kind
    try:
        part = find(_reference(kind, name, key))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'{key}: {error}') from error
    check_arguments(part, name, arguments, key)
    return part


def build(kind: str, name: Any, arguments: Mapping[str, Any], key: str = '') -> Any:
    """Check and construct a part; arguments and errors as for `check`."""
    part = check(kind, name, arguments, key)
    try:
        return part(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        if type(error).__module__.startswith('llm2clip.'):
            raise
        raise ConfigError(f'{key or kind}: {error}') from error


def build_all(kind: str, chosen: Mapping[str, Any]) -> list[Any]:
    """Build the parts of a mapping name -> arguments."""
    return [build(kind, name, arguments or {}, f'{kind}.{name}') for name, arguments in chosen.items()]


def build_source(source: Mapping[str, Any]) -> Any:
    """Build a data source: its splits, and the samples that it left out."""
    return build('source', *named(source, 'source'))


def open_set(kind: str, source: Mapping[str, Any], key: str) -> Any:
    """Build an evaluation set of a kind: ``retrieval``, ``zeroshot`` or ``linear_probe``.

    `source` has its ``name`` and arguments, and is at `key`.  Raise a ConfigError if there is no such set, or if its
    files are missing or damaged.
    """
    try:
        return build(kind, *named(source, key), key)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error) if str(error).startswith(key) else f'{key}: {error}') from None
