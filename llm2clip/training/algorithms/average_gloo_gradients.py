# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""FSDP2 on CPU: gradients that are a mean over ranks, as they are on GPUs."""

from typing import Optional

import torch
import torch.distributed
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

__all__ = ['AverageGlooGradients', 'average_gloo_gradients']


def average_gloo_gradients(model: torch.nn.Module) -> None:
    """Divide sharded gradients by the world size where gloo has summed them.

    FSDP2 of torch 2.7 reduces gradients with ``ReduceOp.AVG``; gloo sums instead, silently, over the ranks of a copy of
    the model and over the copies.  AdamW hides the factor, but norms, clipping and other optimizers do not.  Does
    nothing for NCCL and without FSDP.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != 'gloo':
        return
    for parameter in model.parameters():
        if isinstance(parameter.grad, DTensor):
            parameter.grad.div_(parameter.grad.device_mesh.size())


class AverageGlooGradients(Algorithm):
    """Run `average_gloo_gradients` when a batch's gradients are complete, before they are clipped."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        average_gloo_gradients(state.model)
