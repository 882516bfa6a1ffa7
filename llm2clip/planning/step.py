# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The dry run of one training step: what it takes of one GPU, found by rank 0's step on fake tensors.

Model, optimizer, sharding, loss and GradCache are the real ones.  Of many microbatches, which are alike, one runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from composer.core import Precision
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy, sync_optimizer_and_model_params
from composer.models import ComposerModel
from composer.utils import dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from llm2clip.config import Stage2Config, TrainConfig
from llm2clip.data.image_embeddings import float_vectors, split_columns
from llm2clip.data.texts import pack_sides, text_sides
from llm2clip.models.sharding import fsdp2_config, set_up_units
from llm2clip.models.stage1 import MaskedNextTokenPrediction
from llm2clip.planning.fake import Meter, as_on_cuda, fill_with_fakes
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder, Tokenized, encode_tokens
from llm2clip.teacher.llm import shard_encoder
from llm2clip.training.algorithms.batches import InitialImages
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows
from llm2clip.training.optim import build_optimizer

__all__ = ['EncoderPlan', 'MeanMask', 'StepCost', 'dry_run_encoder', 'dry_run_step', 'image_batch', 'precision_of']

Batch = dict[str, Any]
_AUTOCAST = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}


@dataclass
class EncoderPlan:
    """How a frozen text encoder runs: on the meta device, in the type in which it computes."""

    encoder: TextEncoder
    tokens: int  # of one caption
    batch_tokens: int  # per forward pass
    precision: str
    sharded: bool = False
    captions_per_image: int = 1

    @property
    def captions(self) -> int:
        """Captions per forward pass."""
        return max(1, self.batch_tokens // self.tokens)

    def run(self) -> None:
        """One forward pass."""
        tokens = [Tokenized([1] * self.tokens, 0, 0)] * self.captions
        encode_tokens(self.encoder, tokens, self.batch_tokens, self.precision, self.sharded)


@dataclass
class StepCost:
    """Bytes on one GPU, and its FLOPs in a step."""

    parameters: int = 0  # of the model, or its shards
    optimizer: int = 0
    ema: int = 0
    teacher: int = 0
    copy: int = 0  # the frozen one of self-distillation
    gradients: int = 0
    buckets: int = 0  # DDP's copy of the gradients, in which they are averaged
    activations: int = 0  # everything else at the peak
    peak: int = 0
    checkpoint: int = 0  # weights and optimizer state over all GPUs, as a checkpoint holds them
    flops: int = 0
    recomputed: int = 0  # FLOPs among them that a step with more memory would not need


def dry_run_step(
    model: ComposerModel, config: TrainConfig, make_batch: Callable[[int], Batch], teacher: Optional[EncoderPlan] = None
) -> StepCost:
    """Run a step that is not the first: the optimizer has its state, the last step's gradients are there.

    Args:
        model: On the meta device; it is used up.
        config: The run's; its ranks are those of `fake_ranks`.
        make_batch: Number of samples -> batch as the loader makes it.
        teacher: The frozen one in the loop.
    """
    cost, meter, ranks, fsdp = StepCost(), Meter(), dist.get_world_size(), config.fsdp
    precision = precision_of(config.precision, config.device)
    autocast = torch.autocast('cpu', _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)
    device_batch = config.global_train_batch_size // ranks
    microbatch = config.device_train_microbatch_size or device_batch
    distilled = isinstance(config, Stage2Config) and config.self_distillation.enabled
    initial = InitialImages(model.model) if distilled else None  # pyright: ignore[reportArgumentType]
    # Before the fake tensors, since a mesh needs real numbers.
    mesh = init_device_mesh('cpu', (ranks,)) if ranks > 1 else None
    sharding = None if fsdp is None or mesh is None else fsdp2_config(fsdp, 'cpu')
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_with_fakes(model)
        model.train()
        optimizer = build_optimizer(config, model)
        cost.checkpoint = sum(map(_bytes, model.state_dict().values()))  # of stage 1, only what is trained
        trainable = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
        # As Composer does it, but for its check of the device: it has no mixed precision on a CPU.
        if fsdp is not None and fsdp.activation_checkpointing:
            apply_ac(model, True, False, generate_composer_model_check_fn(model))
        if fsdp is not None and sharding is not None:
            sharding.device_mesh = sharding.device_mesh or mesh
            with sync_optimizer_and_model_params(optimizer, model):
                prepare_fully_shard(model, sharding, precision, generate_composer_model_policy(model))
            set_up_units(model, fsdp)
        elif ranks > 1:
            cost.buckets = trainable
        batch = make_batch(device_batch)
        if 'grad_cache' in config.algorithms:
            batch = with_rows(batch, model.feature_names)  # pyright: ignore[reportArgumentType]
        batches = [batch, *split_columns(batch, microbatch)]
        cost.parameters = meter.add_module(model)
        if teacher is not None:
            fill_with_fakes(teacher.encoder.eval().requires_grad_(False))
            if teacher.sharded and mesh is not None:
                shard_encoder(teacher.encoder, mesh)
            cost.teacher = meter.add_module(teacher.encoder)
        if initial is not None:
            fill_with_fakes(initial)
            if sharding is not None and mesh is not None:
                initial.shard(mesh)
            cost.copy = meter.add_module(initial)
        with meter, as_on_cuda():
            before = meter.current
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            cost.gradients, before = meter.current - before, meter.current
            optimizer.step()
            cost.optimizer = meter.current - before
            cost.checkpoint += sum(_bytes(value) for state in optimizer.state.values() for value in state.values()
                                   if isinstance(value, torch.Tensor))
            meter.peak = meter.current
            if teacher is not None:
                with meter.counting(device_batch * teacher.captions_per_image / teacher.captions):
                    teacher.run()
            if initial is not None:
                with autocast, meter.counting(device_batch / microbatch):
                    features = initial(batches[1]['pixel_values'].clone())
                for part in batches:
                    part['initial_image_features'] = features.new_zeros(len(part['index']), features.shape[1])
            _run_step(model, optimizer, batches, 'grad_cache' in config.algorithms, autocast, meter)
    cost.ema = cost.parameters if 'ema' in config.algorithms else 0
    cost.peak = meter.peak + cost.buckets + cost.ema
    cost.activations = meter.peak - cost.parameters - cost.optimizer - cost.teacher - cost.copy - cost.gradients
    cost.flops, cost.recomputed = int(meter.flops), int(meter.recomputed)
    return cost


def _run_step(
    model: ComposerModel, optimizer: torch.optim.Optimizer, batches: list[Batch], cache: bool,
    autocast: torch.autocast, meter: Meter,
) -> None:
    """Forward pass, backward pass and optimizer, in Composer's order, of the batch and its microbatches."""
    batch, *microbatches = batches
    loss: Any = model.loss
    parts = len(batch['index']) / len(microbatches[0]['index'])
    cached, first = None, {}

    def prepare(part: Batch) -> Batch:
        copied = float_vectors(_copied(part))
        texts = [copied[side + 'input_ids'] for side in text_sides(copied)]
        return pack_sides(copied, [of.shape[1] for of in texts for _ in of]) if texts else copied

    def first_pass(part: Batch) -> Any:
        """After the first microbatch, the others leave their features only."""
        if not first:
            with meter.counting(parts, again=True):
                first.update(model(part))
            return first
        return {name: value.new_zeros(len(part['index']), *value.shape[1:]) if value.ndim > 1 else value
                for name, value in first.items()}

    if cache and len(microbatches) > 1:
        cached = cache_gradients(first_pass, loss, batch, microbatches, prepare, lambda: autocast)
        first.clear()
    # Of several microbatches, the one that runs adds to the gradients of those before it.
    optimizer.zero_grad(set_to_none=len(microbatches) == 1)
    part = prepare(microbatches[0])
    kept = _copied(part)  # by Composer, for metrics of the training
    with autocast, meter.counting(parts):
        outputs = model(part)
        total = loss(outputs, part) if cached is None else surrogate_loss(outputs, part, cached)
    with meter.counting(parts, backward=True):
        total.backward()
    del outputs, total, kept
    optimizer.step()


def precision_of(precision: Optional[str], device: Optional[str]) -> Precision:
    """The precision of a run, on a GPU unless it names another device."""
    return Precision(precision or ('fp32' if device == 'cpu' else 'amp_fp16'))


def dry_run_encoder(plan: EncoderPlan) -> StepCost:
    """Memory and FLOPs of one forward pass of a frozen encoder over `batch_tokens` tokens."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_with_fakes(plan.encoder.eval().requires_grad_(False))
        meter = Meter()
        weights = meter.add_module(plan.encoder)
        with meter, as_on_cuda():
            plan.run()
    return StepCost(teacher=weights, activations=meter.peak - weights, peak=meter.peak, flops=int(meter.flops))


class MeanMask(MaskedNextTokenPrediction):
    """With as many masked tokens as there are on average, wherever they are."""

    probability = 0.0

    def loss(self, outputs: torch.Tensor, batch: Batch, *args: Any) -> torch.Tensor:
        states = outputs.flatten(0, 1)[:int(outputs.shape[0] * outputs.shape[1] * self.probability)]
        return F.cross_entropy(self.head(states).float(), torch.zeros(len(states), dtype=torch.long))


def image_batch(
    n: int, image_size: int, llm_embed_dim: int = 0, captions: int = 1, texts: bool = False
) -> Batch:
    """A batch of stage 2: `n` samples with the vectors (`llm_embed_dim` > 0) and the `texts` of so many captions."""
    shape = (n,) if captions == 1 else (n, captions)
    batch: Batch = {name: torch.zeros(n, dtype=torch.long) for name in ('index', 'sample_seed')}
    batch['text_id'] = torch.zeros(shape, dtype=torch.long)
    batch['pixel_values'] = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8)
    if llm_embed_dim:
        batch['text_embedding'] = torch.empty(*shape, llm_embed_dim, dtype=torch.float16)
    if texts:
        batch['caption'] = ['-'] * n if captions == 1 else [['-'] * n] * captions
    return batch


def _copied(batch: Batch) -> Batch:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _bytes(tensor: torch.Tensor) -> int:
    """Size of a tensor, or of all its shards."""
    return tensor.numel() * tensor.element_size()
