# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Algorithms on gradients and weights: averaging under gloo, clamped temperature."""

import math
from typing import Optional

import torch
import torch.distributed
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

from llm2clip.config.ranges import Positive


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
