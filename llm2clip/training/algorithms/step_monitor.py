# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a step costs and how large its gradient is."""

import time
from collections.abc import Mapping
from typing import Any, Optional

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
    """Log ``gradient_norm`` of the last step as it is before clipping, and ``time/data_wait``, the seconds per step
    without a batch, a mean over the steps since the last reading and over the ranks.

    An algorithm and not a callback, since those only run after the algorithms of an event: after the gradients are
    clipped, and after `GradCache` has done its first pass.
    """

    def __init__(self) -> None:
        self._start: Optional[float] = None
        self._waits: list[float] = []
        self._norm = torch.zeros(())

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        if event == Event.BEFORE_DATALOADER:
            self._start = time.monotonic()
        elif event == Event.AFTER_DATALOADER and self._start is not None:
            self._waits.append(time.monotonic() - self._start)
        elif event == Event.AFTER_TRAIN_BATCH:
            self._norm = gradient_norm(state.model)

    def measure(self, state: State) -> dict[str, Any]:
        wait, self._waits = sum(self._waits) / len(self._waits), []
        return {'gradient_norm': self._norm, 'time/data_wait': wait}

    def report(self, values: Mapping[str, Any], state: State) -> Mapping[str, float]:
        return values
