# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stop where training breaks, before a checkpoint takes it over."""

import math
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.models.sharding import whole

__all__ = ['NonfiniteError', 'StopAtNonfinite']


class NonfiniteError(RuntimeError):
    """Loss or weights are NaN or infinite; the message names the step, the samples and the last checkpoint."""


class StopAtNonfinite(Callback):
    """Raise a NonfiniteError, on all ranks, after a step whose loss is not finite, or that makes a weight so.

    No checkpoint is written of such a step, so each one that there is can be resumed from.

    Args:
        checkpoints: Where they are, for the message.
    """

    def __init__(self, checkpoints: str) -> None:
        self.checkpoints = checkpoints
        self._sample_ids: list[str] = []
        self._finite: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Rows of the batch, and whether their features are finite."""

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._sample_ids, self._finite = state.batch['sample_id'], []

    def before_backward(self, state: State, logger: Logger) -> None:
        outputs: Any = state.outputs
        for name, value in outputs.items() if isinstance(outputs, dict) else ():
            if value.ndim == 2:
                rows = state.batch.get(f'{name}_row', torch.arange(len(value)))
                self._finite.append((rows, torch.isfinite(value.detach()).all(1)))

    def batch_end(self, state: State, logger: Logger) -> None:
        step, loss = state.timestamp.batch.value - 1, state.total_loss_dict['loss/train/total']
        if not math.isfinite(loss):
            bad = [name for names in dist.all_gather_object(self._bad_samples()) for name in names]
            samples = f'samples with features that are not finite: {bad}' if bad else f'samples: {self._sample_ids}'
            raise NonfiniteError(f'the loss of step {step} is {loss}; {samples}; {self._last()}')
        trained = [weight for weight in state.model.parameters() if weight.requires_grad]
        if not math.isfinite(whole(torch.nn.utils.get_total_norm(trained)).item()):
            raise NonfiniteError(f'step {step} made weights that are not finite, although its loss is finite; samples: '
                                 f'{self._sample_ids}; {self._last()}')

    def _bad_samples(self) -> list[str]:
        """This rank's samples with a feature that is not finite."""
        bad = {row for rows, finite in self._finite for row in rows.cpu()[~finite.cpu()].tolist()}
        return [self._sample_ids[row] for row in sorted(bad)]

    def _last(self) -> str:
        if '://' in self.checkpoints:
            return f'the last checkpoint is in {self.checkpoints}'
        latest = Path(self.checkpoints, 'latest-rank0.pt')
        return f'the last checkpoint is {latest.resolve()}' if latest.exists() else 'there is no checkpoint yet'
