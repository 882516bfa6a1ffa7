# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a training step needs of one GPU, found by running it without data: every tensor is there but has no content."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from composer.models import ComposerModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm2clip.models.sharding import planned_units, recompute
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows

__all__ = ['Memory', 'StepPlan', 'step_memory']

Batch = dict[str, Any]


@dataclass
class StepPlan:
    """How a step is run.

    Attributes:
        ranks: GPUs.
        device_batch: Samples per GPU.
        microbatch: Samples per forward pass; fewer than `device_batch` with GradCache, or for a loss without negatives.
        contrastive: Whether the loss is that of the global batch.
        bfloat16: Autocast.
        sharded: FSDP2.
        recompute: Activation checkpointing by FSDP2.
        ema: Whether a moving average of the weights is kept.
        teacher: Bytes of a frozen teacher in the loop.
    """

    ranks: int
    device_batch: int
    microbatch: int
    contrastive: bool = True
    bfloat16: bool = False
    sharded: bool = False
    recompute: bool = False
    ema: bool = False
    teacher: int = 0


@dataclass
class Memory:
    """Bytes on one GPU.  Not everything is there at once: the peak is less than the sum."""

    parameters: int
    gradients: int
    buckets: int
    """DDP's copy of the gradients, in which they are averaged."""
    optimizer: int
    """The state of the optimizer."""
    activations: int
    logits: int
    """What the loss itself needs: the global batch's features and logits, with gradients."""
    unsharded: int
    """FSDP2's gathered weights: those outside the blocks, the block that is computed and the next."""
    ema: int
    teacher: int
    peak: int
    optimizer_whole: int
    """The state over all GPUs, which a checkpoint holds once."""


def step_memory(
    model: ComposerModel,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    make_batch: Callable[[int], Batch],
    plan: StepPlan,
) -> Memory:
    """Memory of a training step, when the optimizer has its state.

    Args:
        model: On the meta device; it is used up.
        make_optimizer: Model -> optimizer over its trainable parameters.
        make_batch: Number of samples -> batch of the model.
        plan: How the step is run.
    """
    with FakeTensorMode():
        _without_content(model)
        model.train()
        optimizer = make_optimizer(model)
        if plan.recompute:
            recompute(model)
        with _Tracker(model) as tracker:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            optimizer.zero_grad()
            tracker.peak = 0
            _step(model, optimizer, make_batch, plan)
        return _on_one_gpu(model, optimizer, tracker, _loss_memory(model, make_batch, plan), plan)


class _Tracker(TorchDispatchMode):
    """The most bytes that all tensors take at once.

    Torch's own `MemTracker` wants every parameter trained and each module run once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = list(model.parameters())
        self.current = self.peak = self.gradients_at_peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in (*self.parameters, *model.buffers()):
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.current -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.current += size
        if self.current > self.peak:
            self.peak = self.current
            self.gradients_at_peak = sum(_bytes(p.grad) for p in self.parameters if p.grad is not None)


def _without_content(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device."""
    seen: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in seen:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    seen[id(tensor)] = (nn.Parameter(fake, requires_grad=tensor.requires_grad)
                                        if isinstance(tensor, nn.Parameter) else fake)
                if tensor is not None:
                    tensors[name] = seen[id(tensor)]  # pyright: ignore[reportArgumentType]


def _step(
    model: ComposerModel, optimizer: torch.optim.Optimizer, make_batch: Callable[[int], Batch], plan: StepPlan
) -> None:
    last: list[Any] = []

    def forward(batch: Batch) -> Any:
        last[:] = [model(batch)]
        return last[0]

    def first_pass(batch: Batch) -> Any:
        """The microbatches are alike: after the first, each leaves its features only."""
        if not last or len(batch['index']) != plan.microbatch:
            return forward(batch)
        return {name: torch.zeros_like(value) for name, value in last[0].items()}

    def precision() -> torch.autocast:
        return torch.autocast('cpu', torch.bfloat16, enabled=plan.bfloat16)

    def loss(outputs: Any, batch: Batch) -> Any:
        return model.loss(*(_of_all_ranks(outputs, batch, plan.ranks) if plan.contrastive else (outputs, batch)))

    batch, cached = make_batch(plan.device_batch), None
    cache = plan.contrastive and plan.microbatch < plan.device_batch
    if cache:
        batch = with_rows(batch, model.feature_names)  # pyright: ignore[reportArgumentType]
    parts = [{name: value[start:start + plan.microbatch] for name, value in batch.items()}
             for start in range(0, plan.device_batch, plan.microbatch)]
    if cache:
        cached = cache_gradients(first_pass, loss, batch, parts, precision=precision)
    for part in parts[:2]:
        with precision():
            outputs = forward(part)
            total = loss(outputs, part) if cached is None else surrogate_loss(outputs, part, cached)
        total.backward()
        del outputs, total
        last.clear()
    optimizer.step()
    optimizer.zero_grad()


def _of_all_ranks(outputs: Mapping[str, torch.Tensor], batch: Batch, ranks: int) -> tuple[Batch, Batch]:
    """As gathered: the others' features beside this rank's."""
    gathered = {name: torch.cat([value, *[torch.zeros_like(value)] * (ranks - 1)]) if value.ndim == 2 else value
                for name, value in outputs.items()}
    ids = {name: torch.cat([value] * ranks) for name, value in batch.items() if name.endswith('text_id')}
    return gathered, {**batch, **ids}


def _loss_memory(model: ComposerModel, make_batch: Callable[[int], Batch], plan: StepPlan) -> int:
    if not plan.contrastive:
        return 0
    with torch.no_grad():
        outputs = model(make_batch(1))
    leaves = {name: (torch.empty(plan.device_batch, value.shape[1]) if value.ndim == 2 else value.detach())
              .requires_grad_() for name, value in outputs.items()}
    batch = make_batch(plan.device_batch)
    with _Tracker(nn.Module()) as tracker:
        total: Any = model.loss(*_of_all_ranks(leaves, batch, plan.ranks))
        total.backward()
    return tracker.peak


def _bytes(tensor: torch.Tensor, ranks: int = 1) -> int:
    """Size of a tensor, or of the first rank's shard: FSDP2 splits the rows."""
    if ranks > 1 and tensor.ndim:
        return -(-len(tensor) // ranks) * (tensor.numel() // max(1, len(tensor))) * tensor.element_size()
    return tensor.numel() * tensor.element_size()


def _on_one_gpu(
    model: ComposerModel, optimizer: torch.optim.Optimizer, tracker: _Tracker, logits: int, plan: StepPlan
) -> Memory:
    split = plan.ranks if plan.sharded else 1
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]

    def state(split: int) -> int:
        return sum(_bytes(value, split if value.shape == parameter.shape else 1)
                   for parameter, values in optimizer.state.items() for value in values.values()
                   if isinstance(value, torch.Tensor))

    whole, shard = sum(map(_bytes, parameters)), sum(_bytes(parameter, split) for parameter in parameters)
    unsharded = _unsharded(model) if split > 1 else 0
    buckets = sum(map(_bytes, trainable)) if plan.ranks > 1 and split == 1 else 0
    gradients = tracker.gradients_at_peak
    ema = sum(map(_bytes, trainable)) // split if plan.ema else 0
    saved = whole - shard + state(1) - state(split) + gradients - gradients // split
    return Memory(
        parameters=shard, gradients=sum(_bytes(parameter, split) for parameter in trainable), buckets=buckets,
        optimizer=state(split), activations=tracker.peak - whole - state(1) - gradients, logits=logits,
        unsharded=unsharded, ema=ema, teacher=plan.teacher,
        peak=tracker.peak - saved + unsharded + buckets + ema + plan.teacher,
        optimizer_whole=state(1))


def _unsharded(model: ComposerModel) -> int:
    """What FSDP2 has gathered at once: the outermost unit's own parameters, and two of the blocks inside it."""
    units = planned_units(model)
    sizes = []
    for unit in units:
        inner = {id(parameter) for other in unit.modules() if other in units and other is not unit
                 for parameter in other.parameters()}
        sizes.append(sum(_bytes(parameter) for parameter in unit.parameters() if id(parameter) not in inner))
    outermost, *blocks = sizes
    return outermost + 2 * max(blocks, default=0)
