# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stop where training breaks, before a checkpoint takes it over."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.tensor import DTensor

__all__ = ['NonfiniteError', 'StopAtNonfinite']


class NonfiniteError(RuntimeError):
    """Loss or weights are NaN or infinite; the message names the step, the samples and the last checkpoint."""


@dataclass
class _Step:
    """One that nobody has looked at yet.  The tensors stay on their device."""

    number: int
    sample_ids: list[str]
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of its microbatches."""
    finite: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Rows of the batch, and whether their features are finite."""
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Norm of those of this rank that are trained, as the step leaves them."""


class StopAtNonfinite(Callback):
    """Raise a NonfiniteError, on all ranks, at a loss that is not finite and at a step that makes a weight so.

    That is when `Readings` reads what was measured: once per `log_interval`, and before every checkpoint, each of which
    is therefore a good one.  It comes before `Readings` in the list of callbacks.

    Args:
        checkpoints: Where they are, for the message.
    """

    def __init__(self, checkpoints: str) -> None:
        self.checkpoints = checkpoints
        self._steps: list[_Step] = []

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._steps.append(_Step(state.timestamp.batch.value, state.batch['sample_id']))

    def before_backward(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        step = self._steps[-1]
        step.losses.append(state.loss.detach().sum())
        outputs: Any = state.outputs
        for name, value in outputs.items() if isinstance(outputs, dict) else ():
            if value.ndim == 2:
                rows = state.batch.get(f'{name}_row', torch.arange(len(value)))
                step.finite.append((rows, torch.isfinite(value.detach()).all(1)))

    def batch_end(self, state: State, logger: Logger) -> None:
        weights = [weight.to_local() if isinstance(weight, DTensor) else weight
                   for weight in state.model.parameters() if weight.requires_grad]
        self._steps[-1].weights = torch.nn.utils.get_total_norm(weights)

    def measure(self, state: State) -> dict[str, Any]:
        return {'losses': torch.stack([torch.stack(step.losses).mean() for step in self._steps]),
                'weights': torch.stack([step.weights for step in self._steps])}

    def report(self, values: Mapping[str, Any], state: State) -> Mapping[str, float]:
        for step, loss, weights in zip(self._steps, values['losses'], values['weights'], strict=True):
            if not math.isfinite(loss):
                bad = [name for names in dist.all_gather_object(_bad_samples(step)) for name in names]
                samples = (f'samples with features that are not finite: {bad}' if bad
                           else f'samples: {step.sample_ids}')
                raise NonfiniteError(f'the loss of step {step.number} is {loss}; {samples}; {self._last()}')
            if not math.isfinite(weights):
                raise NonfiniteError(f'step {step.number} made weights that are not finite, although its loss is '
                                     f'finite; samples: {step.sample_ids}; {self._last()}')
        self._steps.clear()
        return {}

    def _last(self) -> str:
        if '://' in self.checkpoints:
            return f'the last checkpoint is in {self.checkpoints}'
        latest = Path(self.checkpoints, 'latest-rank0.pt')
        return f'the last checkpoint is {latest.resolve()}' if latest.exists() else 'there is no checkpoint yet'


def _bad_samples(step: _Step) -> list[str]:
    """This rank's samples with a feature that is not finite."""
    bad = {row for rows, finite in step.finite for row in rows.cpu()[~finite.cpu()].tolist()}
    return [step.sample_ids[row] for row in sorted(bad)]
