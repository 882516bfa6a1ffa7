# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Exact gradients of a contrastive loss in the memory of a microbatch (Gao et al. 2021)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import torch
from composer.core import Algorithm, Event, State
from composer.core.data_spec import default_split_batch
from composer.loggers import Logger

from llm2clip.device import get_precision_context
from llm2clip.models.sharding import without_ddp

Batch = dict[str, Any]
Outputs = Mapping[str, torch.Tensor]


@dataclass
class CachedGradients:
    """Results of the first pass that the second pass needs."""

    loss: torch.Tensor  # of the global batch
    features: dict[str, torch.Tensor]  # name -> gradient with respect to this rank's features (B, …, D)
    # name -> gradient of an output that all samples share, such as `logit_scale`
    shared: dict[str, torch.Tensor]
    random_states: list[list[torch.Tensor]]  # before each microbatch, for the same dropout in the second pass


def with_rows(batch: Batch, names: Sequence[str]) -> Batch:
    """Return the batch with ``<name>_row`` ``(B,)`` for each feature, row indices that survive splitting."""
    return batch | {f'{name}_row': torch.arange(len(batch['index'])) for name in names}


def cache_gradients(
    model: Callable[[Batch], Outputs],
    loss: Callable[[Outputs, Batch], torch.Tensor],
    batch: Batch,
    microbatches: Sequence[Batch],
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> CachedGradients:
    """Run the first pass: features without gradient, then the loss and its gradients with respect to the
    features.

    Args:
        model: Microbatch -> outputs.  Outputs with two or more axes are features, one row per sample; all
            samples share the others.
        loss: (outputs of the whole batch, batch) -> loss of the global batch.
        batch: The whole batch of this rank.
        microbatches: The batch in parts, with the ``<name>_row`` of `with_rows`.
        prepare: Microbatch -> input of the model.
        precision: Context manager for model and loss.
    """
    random_states: list[list[torch.Tensor]] = []
    parts: dict[str, list[torch.Tensor]] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    for microbatch in microbatches:
        random_states.append(_random_state())
        with torch.no_grad(), precision():
            outputs = model(prepare(microbatch))
        for name, value in outputs.items():
            parts.setdefault(name, []).append(value)
            if value.ndim > 1:
                rows.setdefault(name, []).append(microbatch[f'{name}_row'])
    leaves = {}
    for name, values in parts.items():
        value = torch.cat(values)[torch.cat(rows[name]).argsort()] if name in rows else values[0]
        leaves[name] = value.detach().requires_grad_()
    with torch.enable_grad(), precision():
        total = loss(leaves, batch)
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
    return CachedGradients(
        total.detach(), {name: gradients[name] for name in rows},
        {name: gradient for name, gradient in gradients.items() if name not in rows}, random_states)


def surrogate_loss(outputs: Outputs, microbatch: Batch, cached: CachedGradients) -> torch.Tensor:
    """Return the second pass's loss: the value for the global batch with the gradient of a microbatch's part.

    Composer weights it by the microbatch's share of the batch and sums over microbatches, which yields the
    true loss and gradients.  The microbatch has the ``<name>_row`` of `with_rows`.
    """
    parts = []
    for name, value in outputs.items():
        if name in cached.features:
            gradient = cached.features[name]
            part = (value.float() * gradient[microbatch[f'{name}_row'].to(gradient.device)]).sum()
            parts.append(part * (len(gradient) / len(value)))
        else:
            parts.append((value * cached.shared[name]).sum())
    total = torch.stack(parts).sum()
    return cached.loss + (total - total.detach())


class GradCache(Algorithm):
    """Train at any `device_train_microbatch_size` with the exact gradients of the whole batch.

    The model's forward has to return a dict of features ``(B, …, D)`` (and shared outputs such as
    `logit_scale`), and the loss has to be a function of these.  The forward pass of each microbatch runs
    twice, unless there is only one.  The logged loss is also that of the whole batch.

    Args:
        split_batch: The loader's function: (batch, microbatch size) -> microbatches.
        microbatch_transforms: The loader's function: microbatch on its device -> input of the model.
    """

    def __init__(
        self, split_batch: Callable[[Batch, int], Sequence[Batch]] = default_split_batch,
        microbatch_transforms: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self.split_batch = split_batch
        self.microbatch_transforms = microbatch_transforms
        self._loss: Any = None  # that of the model, from INIT on
        self._cached: Optional[CachedGradients] = None
        self._microbatch = 0

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.AFTER_DATALOADER, Event.BEFORE_FORWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        if event == Event.INIT:
            model: Any = state.model
            self._loss, model.loss = model.loss, self._surrogate
        elif event == Event.AFTER_DATALOADER:
            self._first_pass(state)
        elif self._cached is not None:
            _set_random_state(self._cached.random_states[self._microbatch])
            self._microbatch += 1

    def _surrogate(self, outputs: Outputs, microbatch: Batch) -> torch.Tensor:
        if self._cached is None:
            return self._loss(outputs, microbatch)
        return surrogate_loss(outputs, microbatch, self._cached)

    def _first_pass(self, state: State) -> None:
        model = without_ddp(state.model)
        if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
            raise ValueError('grad_cache: the model has BatchNorm layers in training mode, whose features '
                             'depend on the microbatch; freeze them (model.vision.freeze_batch_norm)')
        size: Any = state.device_train_microbatch_size
        self._microbatch, self._cached = 0, None
        batch = with_rows(state.batch, model.feature_names)
        microbatches = self.split_batch(batch, size)
        if len(microbatches) == 1:
            return
        state.batch = batch
        self._cached = cache_gradients(
            model, self._loss, batch, microbatches,
            lambda microbatch: self.microbatch_transforms(state.device.batch_to_device(microbatch)),
            lambda: get_precision_context(state.precision, state.precision_config))


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
