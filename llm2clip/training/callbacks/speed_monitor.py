# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Throughput, FLOPs and the share of the GPU that they use."""

from collections.abc import Callable
from typing import Any, Optional

import composer.callbacks
import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

__all__ = ['SpeedMonitor']

# Dense operations a second in 16 bits on GPUs that Composer 0.32 does not know, from NVIDIA's data sheets of HGX B200,
# GB200 NVL72 and H100 NVL; the first name that occurs in that of the device counts.
_PEAKS = {'gb200': 2.5e15, 'b200': 2.25e15, 'h100 nvl': 0.8355e15}


def _known_peak(precision: str) -> Optional[float]:
    if not torch.cuda.is_available() or precision not in ('amp_bf16', 'amp_fp16'):
        return None
    device = torch.cuda.get_device_name().lower()
    return next((peak for name, peak in _PEAKS.items() if name in device), None)


class SpeedMonitor(composer.callbacks.SpeedMonitor):
    """Composer's, with ``throughput/device/flops_per_sec`` and ``throughput/device/mfu`` of both stages.

    The model's `batch_flops` counts, and what one rank computes stands for all: Composer's own way would have every
    rank wait for the others, and the host for the GPU, in every step.
    """

    _flops: Optional[Callable[[Any], float]] = None

    def init(self, state: State, logger: Logger) -> None:
        self._flops = state.model.batch_flops()  # pyright: ignore[reportCallIssue] (all models of this project have it)
        if self.gpu_flops_available is None:
            self.gpu_flops_available = _known_peak(state.precision.value)
        super().init(state, logger)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self._flops is not None:
            # Here the batch is still on the host.
            self.history_flops.append(self._flops(state.batch) * dist.get_world_size())
