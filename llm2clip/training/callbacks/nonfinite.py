# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stop where training breaks, before a checkpoint takes it over."""

from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

__all__ = ['NonfiniteError', 'StopAtNonfinite']


class NonfiniteError(RuntimeError):
    """Loss or weights are NaN or infinite; the message names the step, the samples and the last checkpoint."""


class StopAtNonfinite(Callback):
    """Raise a NonfiniteError before the backward pass of a loss that is not finite, and after an optimizer step that
    makes a weight so.  Every checkpoint of a run is therefore a good one.

    Args:
        checkpoints: Where they are, for the message.
    """

    def __init__(self, checkpoints: str) -> None:
        self.checkpoints = checkpoints
        self._sample_ids: list[str] = []

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._sample_ids = state.batch['sample_id']

    def before_backward(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        if not torch.isfinite(state.loss).all():
            bad = self._bad_samples(state.outputs, state.batch)
            samples = f'samples with features that are not finite: {bad}' if bad else f'samples: {self._sample_ids}'
            step = state.timestamp.batch.value
            raise NonfiniteError(f'the loss of step {step} is {state.loss.item()}; {samples}; {self._last()}')

    def batch_end(self, state: State, logger: Logger) -> None:
        weights = [weight.to_local() if isinstance(weight, DTensor) else weight
                   for weight in state.model.parameters() if weight.requires_grad]
        if not torch.isfinite(torch.nn.utils.get_total_norm(weights)):
            step = state.timestamp.batch.value - 1
            raise NonfiniteError(f'step {step} made weights that are not finite, although its loss is finite; samples: '
                                 f'{self._sample_ids}; {self._last()}')

    def _last(self) -> str:
        if '://' in self.checkpoints:
            return f'the last checkpoint is in {self.checkpoints}'
        latest = Path(self.checkpoints, 'latest-rank0.pt')
        return f'the last checkpoint is {latest.resolve()}' if latest.exists() else 'there is no checkpoint yet'

    def _bad_samples(self, outputs: Any, batch: dict[str, Any]) -> list[str]:
        """Samples of this microbatch with a feature that is not finite."""
        bad = set()
        for name, value in outputs.items() if isinstance(outputs, dict) else ():
            if value.ndim == 2:
                rows = batch.get(f'{name}_row', torch.arange(len(value))).cpu()
                bad |= set(rows[~torch.isfinite(value).all(1).cpu()].tolist())
        return [self._sample_ids[row] for row in sorted(bad)]
