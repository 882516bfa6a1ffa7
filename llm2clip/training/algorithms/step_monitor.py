# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a step costs and how large its gradient is."""

import time
from typing import Optional

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from llm2clip.models.sharding import whole

__all__ = ['StepMonitor', 'gradient_norm']


def gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """L2 norm of all gradients, those of the other ranks' shards included; on their device, where it stays."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


class StepMonitor(Algorithm):
    """Log ``gradient_norm`` of a step as it is before clipping, and ``time/data_wait``, the seconds that the first rank
    waited for the batch.

    An algorithm and not a callback, since those only run after the algorithms of an event: after the gradients are
    clipped, and after `GradCache` has done its first pass.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        if event == Event.BEFORE_DATALOADER:
            self._start = time.monotonic()
        elif event == Event.AFTER_DATALOADER:
            logger.log_metrics({'time/data_wait': time.monotonic() - self._start})
        else:
            logger.log_metrics({'gradient_norm': gradient_norm(state.model).item()})
