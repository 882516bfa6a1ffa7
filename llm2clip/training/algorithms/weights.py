# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Algorithms on gradients and weights: averaging under gloo, clamped temperature, moving average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Optional

import composer.algorithms
import torch
import torch.distributed
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2clip.config.ranges import Positive
from llm2clip.models.sharding import unwrapped_name, whole


class AverageGlooGradients(Algorithm):
    """Divide sharded gradients by the world size if gloo has summed them, before they are clipped.

    FSDP2 reduces gradients with ``ReduceOp.AVG``.  Under torch 2.7, gloo silently sums over the ranks of a
    replica, and refuses to average over replicas.  Under 2.15 it averages, so the behaviour is probed.  AdamW
    hides the factor, but norms, clipping and other optimizers do not.  A no-op for NCCL and without FSDP.
    """

    def match(self, event: Event, state: State) -> bool:
        is_gloo = torch.distributed.is_initialized() and torch.distributed.get_backend() == 'gloo'
        return event == Event.AFTER_TRAIN_BATCH and is_gloo

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        average = torch.empty(1)  # of ones: 1, or their sum
        torch.distributed.reduce_scatter_tensor(
            average, torch.ones(torch.distributed.get_world_size()), torch.distributed.ReduceOp.AVG)
        for parameter in state.model.parameters():
            if isinstance(parameter.grad, DTensor):
                parameter.grad.div_(average.item())


class ClampLogitScale(Algorithm):
    """Clamp every parameter called `logit_scale` to [0, ln maximum], in log space, after every optimizer step
    (CLIP, section 2.5).

    Args:
        maximum: Largest factor on the cosine similarities.
    """

    def __init__(self, maximum: Positive = 100.0) -> None:
        self.maximum = maximum

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        for name, parameter in state.model.named_parameters():
            if name.rsplit('.', 1)[-1] == 'logit_scale':
                parameter.clamp_(0, math.log(self.maximum))


class EMA(composer.algorithms.EMA):
    """Composer's EMA, which evaluates and saves the averaged weights, with support for FSDP2 and GradCache.

    Under FSDP2, each rank averages its shards.  Checkpoints hold the full average under unwrapped names, so
    that a run can resume on any number of ranks.  After a checkpoint, Composer would leave the average in the
    model until the batch starts: after the first pass of GradCache, and after an update at the end of an
    epoch.
    """

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) or event == Event.BEFORE_DATALOADER and self.ema_weights_active

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.shard_average(state.model)
        super().apply(event, state, logger)
        if event == Event.BEFORE_DATALOADER:
            self._ensure_training_weights_active(state)

    def state_dict(self) -> dict[str, Any]:
        result = super().state_dict()
        average = result['ema_model']
        for kind, values in average.items():
            average[kind] = {unwrapped_name(name): whole(value) for name, value in values.items()}
        return result

    def shard_average(self, model: torch.nn.Module) -> None:
        """Shard the average like the parameters; it is full after loading, and before sharding."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass, the outermost unit is still unsharded
        if self.ema_model is None:
            return
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        names = {unwrapped_name(name): name for name in tensors}
        sharded = {}
        for average_name, value in self.ema_model.named_parameters_dict.items():
            name = names[unwrapped_name(average_name)]
            parameter = tensors[name]
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                          parameter.placements)
            sharded[name] = value
        self.ema_model.named_parameters_dict = sharded
        buffers = self.ema_model.named_buffers_dict
        self.ema_model.named_buffers_dict = {names[unwrapped_name(name)]: buffers[name] for name in buffers}


@contextmanager
def averaged_weights(state: State) -> Iterator[None]:
    """Swap in the averaged weights for the duration of the block; a no-op unless `EMA` has started."""
    ema: Any = next((algorithm for algorithm in state.algorithms if isinstance(algorithm, EMA)), None)
    if ema is None or not ema.ema_started or ema.ema_weights_active:
        yield
        return
    ema.shard_average(state.model)
    ema.ema_model.swap_params(state.model)
    try:
        yield
    finally:
        ema.ema_model.swap_params(state.model)
