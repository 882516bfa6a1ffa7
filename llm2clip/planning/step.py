# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What one training step takes of one GPU, found by running rank 0's step on tensors without content.

Model, optimizer, sharding, loss and gradient cache are the real ones.  What is left out repeats what was run: of many
microbatches, one runs.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.core import Precision
from composer.models import ComposerModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from llm2clip.config import FsdpConfig
from llm2clip.data.image_embeddings import split_columns
from llm2clip.data.loader import pack_sides, text_sides
from llm2clip.data.vectors import float_vectors
from llm2clip.models.mntp import MaskedNextTokenPrediction
from llm2clip.models.sharding import fsdp2_config, prefetch, recompute, shard
from llm2clip.planning.pretended import Flops, Memory, NoValues, as_on_cuda, pretended_ranks, without_content
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder, Tokenized, encode_tokens
from llm2clip.teacher.text_encoder import shard_encoder
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows
from llm2clip.training.algorithms.self_distillation import InitialImages

__all__ = ['MeanMask', 'OnlinePlan', 'StepCost', 'StepPlan', 'rehearse_encoder', 'rehearse_step']

Batch = dict[str, Any]
_AUTOCAST = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}


@dataclass
class OnlinePlan:
    """A frozen teacher in the loop.

    Attributes:
        encoder: On the meta device, in the type in which it runs.
        tokens: Of one caption.
        batch_tokens: Per forward pass.
        precision: As for `encode_tokens`.
        sharded: Whether it is spread over the ranks.
        captions_per_image: Of which each sample has so many.
    """

    encoder: TextEncoder
    tokens: int
    batch_tokens: int
    precision: str
    sharded: bool = False
    captions_per_image: int = 1

    @property
    def captions(self) -> int:
        """Per forward pass."""
        return max(1, self.batch_tokens // self.tokens)


@dataclass
class StepPlan:
    """How a step is run.

    Attributes:
        ranks: GPUs.
        device_batch: Samples per GPU.
        microbatch: Samples per forward pass; fewer than `device_batch` with GradCache, or for a loss without negatives.
        cached: Whether GradCache is there for a loss over more than a microbatch.
        precision: Composer's.
        fsdp: How the model is sharded; None, DDP.
        ema: Whether a moving average of the weights is kept.
        teacher: In the loop.
        distilled: Whether a frozen copy of tower and projection sees the images first.
    """

    ranks: int
    device_batch: int
    microbatch: int
    cached: bool = False
    precision: Precision = Precision.FP32
    fsdp: Optional[FsdpConfig] = None
    ema: bool = False
    teacher: Optional[OnlinePlan] = None
    distilled: bool = False


@dataclass
class StepCost:
    """Bytes on one GPU, those of the first four as long as the training runs, and its FLOPs in a step."""

    parameters: int = 0
    """Of the model, or its shards."""
    optimizer: int = 0
    """The state of the optimizer."""
    ema: int = 0
    teacher: int = 0
    """The frozen teacher's parameters."""
    copy: int = 0
    """Those of the frozen copy of self-distillation."""
    gradients: int = 0
    buckets: int = 0
    """DDP's copy of the gradients, in which they are averaged."""
    activations: int = 0
    """What else there is when most is there."""
    peak: int = 0
    checkpoint: int = 0
    """Of weights and optimizer state over all GPUs, as a checkpoint holds them."""
    flops: int = 0
    recomputed: int = 0
    """FLOPs among them that a step with more memory would not need."""
    attention: int = 0
    """FLOPs among them that grow with the square of the number of tokens."""

    def shorten(self, share: float) -> None:
        """FLOPs of texts that have this share of the tokens; the memory stays that of the longest."""
        again = self.recomputed / max(1, self.flops)
        self.attention, linear = int(self.attention * share**2), self.flops - self.attention
        self.flops = int(linear * share) + self.attention
        self.recomputed = int(self.flops * again)


def rehearse_step(
    model: ComposerModel,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    make_batch: Callable[[int], Batch],
    plan: StepPlan,
) -> StepCost:
    """Run a training step that is not the first: the optimizer has its state, the last step's gradients are there.

    Args:
        model: On the meta device; it is used up.
        make_optimizer: Model -> optimizer over its trainable parameters.
        make_batch: Number of samples -> batch as the loader makes it.
        plan: How the step is run.
    """
    cost = StepCost()
    initial = InitialImages(model.model) if plan.distilled else None  # pyright: ignore[reportArgumentType]
    with ExitStack() as stack:
        mesh = stack.enter_context(pretended_ranks(plan.ranks))
        # Which needs numbers for its own mesh, too.
        fsdp = None if plan.fsdp is None or mesh is None else fsdp2_config(plan.fsdp, 'cpu')
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        without_content(model)
        model.train()
        optimizer = make_optimizer(model)
        cost.checkpoint = sum(map(_bytes, model.state_dict().values()))  # of stage 1, only what is trained
        trainable = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
        if plan.fsdp is not None and plan.fsdp.activation_checkpointing:
            recompute(model)
        if plan.fsdp is not None and fsdp is not None and mesh is not None:
            shard(model, optimizer, dataclasses.replace(fsdp, device_mesh=fsdp.device_mesh or mesh), plan.precision)
            prefetch(model, plan.fsdp.prefetch)
        elif plan.ranks > 1:
            cost.buckets = trainable
        microbatches = _on_the_host(model, make_batch(plan.device_batch), plan)
        if initial is not None:
            without_content(initial)
            if plan.fsdp is not None and mesh is not None:
                initial.shard(mesh)
        online = None if plan.teacher is None else _teacher(plan.teacher, mesh)
        memory = Memory(model)
        cost.parameters = memory.current
        if online is not None:
            memory.add_module(online)
            cost.teacher = memory.current - cost.parameters
        if initial is not None:
            memory.add_module(initial)
            cost.copy = memory.current - cost.teacher - cost.parameters
        with memory, as_on_cuda(), NoValues(), Flops() as flops:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            cost.gradients = memory.current - cost.copy - cost.teacher - cost.parameters
            before = memory.current
            optimizer.step()
            cost.optimizer = memory.current - before
            cost.checkpoint += sum(_bytes(value) for state in optimizer.state.values() for value in state.values()
                                   if isinstance(value, torch.Tensor))
            cost.ema = cost.parameters if plan.ema else 0
            memory.peak = memory.current
            if plan.teacher is not None and online is not None:
                texts = plan.device_batch * plan.teacher.captions_per_image
                with flops.counted(times=texts / plan.teacher.captions):
                    _embed(online, plan.teacher)
            if initial is not None:
                _add_targets(initial, microbatches, plan, flops)
            _step(model, optimizer, microbatches, plan, flops)
    cost.peak = memory.peak + cost.buckets + cost.ema
    cost.activations = memory.peak - cost.parameters - cost.optimizer - cost.teacher - cost.copy - cost.gradients
    cost.flops, cost.recomputed, cost.attention = map(int, (flops.total, flops.again, flops.attention))
    return cost


def rehearse_encoder(plan: OnlinePlan) -> StepCost:
    """Memory and FLOPs of one forward pass of a frozen encoder over `batch_tokens` tokens."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder = _teacher(plan, None)
        with Memory(encoder) as memory, as_on_cuda(), NoValues(), Flops() as flops:
            weights = memory.current
            _embed(encoder, plan)
    return StepCost(teacher=weights, activations=memory.peak - weights, peak=memory.peak, flops=int(flops.total))


class MeanMask(MaskedNextTokenPrediction):
    """With as many masked tokens as there are on average: which ones they are does not change what a step takes."""

    def __init__(self, model: MaskedNextTokenPrediction, probability: float) -> None:
        super().__init__(model.text_encoder, model.head)
        self.probability = probability

    def loss(self, outputs: torch.Tensor, batch: Batch, *args: Any) -> torch.Tensor:
        states = outputs.flatten(0, 1)[:int(outputs.shape[0] * outputs.shape[1] * self.probability)]
        return F.cross_entropy(self.head(states).float(), torch.zeros(len(states), dtype=torch.long))


def _teacher(plan: OnlinePlan, mesh: Optional[DeviceMesh]) -> TextEncoder:
    without_content(plan.encoder)
    plan.encoder.eval().requires_grad_(False)
    if plan.sharded and mesh is not None:
        shard_encoder(plan.encoder, mesh)
    return plan.encoder


def _embed(encoder: TextEncoder, plan: OnlinePlan) -> None:
    """One forward pass."""
    tokens = [Tokenized([1] * plan.tokens, 0, 0)] * plan.captions
    encode_tokens(encoder, tokens, plan.batch_tokens, plan.precision, plan.sharded)


def _add_targets(initial: InitialImages, batches: list[Batch], plan: StepPlan, flops: Flops) -> None:
    """What self-distillation puts into the whole batch and its parts."""
    _, microbatch, *_ = batches
    with _autocast(plan), flops.counted(times=plan.device_batch / plan.microbatch):
        features = initial(microbatch['pixel_values'].clone())
    for batch in batches:
        batch['initial_image_features'] = features.new_zeros(len(batch['index']), features.shape[1])


def _autocast(plan: StepPlan) -> torch.autocast:
    dtype = _AUTOCAST.get(plan.precision)
    return torch.autocast('cpu', dtype, enabled=dtype is not None)


def _on_the_host(model: ComposerModel, batch: Batch, plan: StepPlan) -> list[Batch]:
    """The microbatches, after the whole batch."""
    if plan.cached:
        batch = with_rows(batch, model.feature_names)  # pyright: ignore[reportArgumentType]
    return [batch, *split_columns(batch, plan.microbatch)]


def _copied(batch: Batch) -> Batch:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _step(
    model: ComposerModel, optimizer: torch.optim.Optimizer, batches: list[Batch], plan: StepPlan, flops: Flops
) -> None:
    """In the order in which Composer does it."""
    batch, *microbatches = batches
    loss: Any = model.loss
    parts = plan.device_batch / plan.microbatch
    precision = partial(_autocast, plan)

    def prepare(part: Batch) -> Batch:
        copied = float_vectors(_copied(part))
        texts = [copied[side + 'input_ids'] for side in text_sides(copied)]
        return pack_sides(copied, [of.shape[1] for of in texts for _ in of]) if texts else copied

    cached, first = None, {}

    def first_pass(part: Batch) -> Any:
        """The microbatches are alike: after the first, each leaves its features only."""
        if not first:
            with flops.counted(times=parts, again=True):
                first.update(model(part))
            return first
        return {name: value.new_zeros(len(part['index']), *value.shape[1:]) if value.ndim > 1 else value
                for name, value in first.items()}

    if plan.cached and len(microbatches) > 1:
        cached = cache_gradients(first_pass, loss, batch, microbatches, prepare, precision)
        first.clear()
    # Of several microbatches, the one that runs adds to the gradients of those before it.
    optimizer.zero_grad(set_to_none=len(microbatches) == 1)
    part = prepare(microbatches[0])
    kept = _copied(part)  # by Composer, for metrics of the training
    with precision(), flops.counted(times=parts):
        outputs = model(part)
        total = loss(outputs, part) if cached is None else surrogate_loss(outputs, part, cached)
    with flops.counted(times=parts, backward=True):
        total.backward()
    del outputs, total, kept
    optimizer.step()


def _bytes(tensor: torch.Tensor) -> int:
    """Size of a tensor, or of all its shards."""
    return tensor.numel() * tensor.element_size()
