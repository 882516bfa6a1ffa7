# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Callbacks as users write them, for `callbacks: {user_callbacks:CLASS: {…}}`."""

from datetime import timedelta

import torch
from composer import Callback, Logger, State
from torch._dynamo.utils import counters


class GroupsHaveTimeout(Callback):
    """Every process group of the model waits for as many seconds."""

    def __init__(self, seconds: float) -> None:
        self.timeout = timedelta(seconds=seconds)

    def fit_start(self, state: State, logger: Logger) -> None:
        assert state.device_mesh is not None
        for group in state.device_mesh.get_all_groups():
            assert group._get_backend(torch.device('cpu')).options._timeout == self.timeout


class CountGraphs(Callback):
    """Log the number of graphs that `torch.compile` has compiled so far."""

    def batch_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'graphs': counters['stats']['unique_graphs']}, step=state.timestamp.batch.value - 1)
