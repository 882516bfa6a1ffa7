# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Check the configuration of a training before anything is loaded."""

import os
import shutil
import sysconfig
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from composer import Algorithm, Evaluator, Event, State

from llm2clip.config import FsdpConfig, TrainConfig
from llm2clip.data.streams.safe_dataset import device_batch_size
from llm2clip.device import get_device, why_no_gpu
from llm2clip.errors import ConfigError, refuse, under
from llm2clip.models.llm2clip import build_loss
from llm2clip.ranks import dist
from llm2clip.registry import build, build_all, check, check_arguments, named
from llm2clip.training.callbacks.monitors import SaveBest


def check_train_config(config: TrainConfig) -> None:
    """Check parts, device and ranks before anything is loaded; errors are ConfigErrors.

    `config.check` has checked what depends on the configuration alone.
    """
    name, arguments = named(config.optimizer, 'optimizer')
    build('optimizer', name, {'params': [torch.nn.Parameter(torch.zeros(1))]} | arguments)
    build('scheduler', *named(config.scheduler, 'scheduler'))
    algorithms = dict(zip(config.algorithms, build_all('algorithms', config.algorithms)))
    if 'grad_cache' in algorithms:
        _check_grad_cache(algorithms, config)
    build_loss(config.loss)
    build_all('callbacks', config.callbacks)
    for name, arguments in config.loggers.items():
        check('loggers', name, arguments, f'loggers.{name}')
    if config.compile:
        with under('compile'):
            check_arguments(torch.compile, 'torch.compile', config.compile)
        try:
            torch.compile(torch.nn.Identity(), **config.compile)
        except (RuntimeError, TypeError) as error:  # of a backend, a mode or options
            raise ConfigError(textwrap.shorten(str(error), 200), key='compile') from error
    device_batch = device_batch_size(config.global_train_batch_size, 'global_train_batch_size')
    microbatch = config.device_train_microbatch_size or device_batch
    fsdp, ranks = config.fsdp or FsdpConfig(), dist.get_world_size()
    groups, shards = fsdp.reshard_after_forward, ranks // fsdp.replicate
    refuse([
        ('precision', config.device == 'cpu' and config.precision not in (None, 'fp32'),
         f'{config.precision}, expected fp32, the only one on a CPU; {why_no_gpu()}'),
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


def check_compiler(config: TrainConfig) -> None:
    """Check that this machine has what the default backend of `torch.compile` needs, a C compiler and
    Python's headers; a plan needs neither."""
    if config.compile is None or config.compile.get('backend', 'inductor') != 'inductor':
        return
    compiler = os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if not compiler or not header.is_file():
        raise ConfigError(f'torch.compile needs a C compiler and {header}, expected the packages gcc and '
                          'python3-dev, or null', key='compile')


def _check_grad_cache(algorithms: Mapping[str, Algorithm], config: TrainConfig) -> None:
    """Raise a ConfigError for an algorithm that changes a microbatch, its outputs or its loss."""
    events = (Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS,
              Event.BEFORE_BACKWARD)
    state = State(torch.nn.Identity(), config.seed, config.run_name, get_device(config.device))
    for name, algorithm in algorithms.items():
        if name != 'grad_cache' and any(algorithm.match(event, state) for event in events):
            raise ConfigError('changes the loss of a microbatch, but grad_cache has computed that of the '
                              'whole batch before; expected loss.name: module:class for a loss of your own',
                              key=f'algorithms.{name}')


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
