# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A moving average of the weights, also of sharded ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import composer.algorithms
import torch
from composer.core import Event, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2clip.models.sharding import own_name, whole

__all__ = ['EMA', 'averaged_weights']


class EMA(composer.algorithms.EMA):
    """Composer's, which evaluates and saves the averaged weights, but under FSDP2 too.

    There, each rank averages its shards.  Checkpoints hold the average whole, under the parameters' own names, so that
    any number of ranks goes on from it.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self._like_the_model(state.model)
        super().apply(event, state, logger)

    def state_dict(self) -> dict[str, Any]:
        result = super().state_dict()
        for kind in ('named_parameters_dict', 'named_buffers_dict'):
            if kind in result.get('ema_model', {}):
                result['ema_model'][kind] = {own_name(name): whole(value)
                                             for name, value in result['ema_model'][kind].items()}
        return result

    def _like_the_model(self, model: torch.nn.Module) -> None:
        """Shard the average as the parameters are: it is whole after loading, and before the model was sharded."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass, the outermost parameters are still whole
        if self.ema_model is None:
            return
        average = {own_name(name): value for name, value in self.ema_model.named_parameters_dict.items()}
        self.ema_model.named_parameters_dict = {
            name: _as(parameter, average[own_name(name)]) for name, parameter in model.named_parameters()
            if own_name(name) in average}


def _as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


@contextmanager
def averaged_weights(state: State) -> Iterator[None]:
    """The model has the averaged weights in the block, if it is trained with `EMA` and there are any yet."""
    ema = next((algorithm for algorithm in state.algorithms if isinstance(algorithm, EMA)), None)
    if ema is None or not ema.ema_started or ema.ema_weights_active:
        yield
        return
    ema._like_the_model(state.model)
    ema._ensure_ema_weights_active(state)
    try:
        yield
    finally:
        ema._ensure_training_weights_active(state)
