# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""FSDP2 on CPU: gradients that are a mean over ranks, as they are on GPUs."""

from typing import Optional

import torch
import torch.distributed
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

__all__ = ['AverageGlooGradients']


class AverageGlooGradients(Algorithm):
    """Divide sharded gradients by the world size where gloo has summed them, before they are clipped.

    FSDP2 of torch 2.7 reduces gradients with ``ReduceOp.AVG``; gloo sums instead, silently, over the ranks of a copy of
    the model and over the copies.  AdamW hides the factor, but norms, clipping and other optimizers do not.  Does
    nothing for NCCL and without FSDP.
    """

    def match(self, event: Event, state: State) -> bool:
        return (event == Event.AFTER_TRAIN_BATCH and torch.distributed.is_initialized()
                and torch.distributed.get_backend() == 'gloo')

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        for parameter in state.model.parameters():
            if isinstance(parameter.grad, DTensor):
                parameter.grad.div_(parameter.grad.device_mesh.size())
