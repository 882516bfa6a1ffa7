# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stop before a broken batch reaches the weights."""

from pathlib import Path
from typing import Any, Union

import torch
from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger

__all__ = ['NonfiniteLossError', 'StopAtNonfiniteLoss']


class NonfiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names the step, the samples and the last checkpoint."""


class StopAtNonfiniteLoss(Callback):
    """Raise a NonfiniteLossError before the backward pass of a loss that is not finite.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Union[str, Path]) -> None:
        self.checkpoints = Path(run, 'checkpoints')
        self._sample_ids: list[str] = []

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._sample_ids = state.batch['sample_id']

    def before_backward(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        if torch.isfinite(state.loss).all():
            return
        step = state.timestamp.get(TimeUnit.BATCH).value
        bad = self._bad_rows(state.outputs, state.batch)
        named = (f'samples whose features are not finite: {bad}' if bad else
                 f'samples of this rank: {self._sample_ids}')
        broken = [name for name, weight in state.model.named_parameters()
                  if weight.requires_grad and not torch.isfinite(_local(weight)).all()]
        weights = f' {len(broken)} weights were broken before this step, {broken[0]} first.' if broken else ''
        latest = self.checkpoints / 'latest-rank0.pt'
        last = f'the last checkpoint is {latest.resolve()}' if latest.exists() else 'there is no checkpoint yet'
        raise NonfiniteLossError(
            f'the loss of step {step} is {state.loss.item()}; {named}.{weights} The weights were not changed by this '
            f'step; {last}')

    def _bad_rows(self, outputs: Any, batch: dict[str, Any]) -> list[str]:
        """Samples of this microbatch with a feature that is not finite."""
        if not isinstance(outputs, dict):
            return []
        bad = set()
        for name, value in outputs.items():
            if value.ndim == 2:
                rows = batch.get(f'{name}_row', torch.arange(len(value))).cpu()
                bad |= set(rows[~torch.isfinite(value).all(1).cpu()].tolist())
        return [self._sample_ids[row] for row in sorted(bad)]


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, torch.distributed.tensor.DTensor) else weight
