# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dry run of one training step: memory and FLOPs of one GPU, from the step of rank 0 on fake tensors.

Model, optimizer, sharding, loss and GradCache are the real ones.  Only one of several equal microbatches runs.  Fake
CPU tensors need neither a GPU nor a CUDA build.  Where memory or FLOPs differ between CPU and CUDA, the dry run follows
CUDA: operations that autocast computes in float32, the mask of dropout, the FLOPs of attention.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed
import torch.distributed._tools.fake_collectives  # lets collectives run on fake tensors
import torch.nn as nn
from composer.core import Precision
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy, sync_optimizer_and_model_params
from composer.models import ComposerModel
from composer.utils import dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.library import _scoped_library
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from llm2clip.config import Stage2Config, TrainConfig
from llm2clip.data.image_embeddings import float_vectors, split_columns
from llm2clip.data.texts import pack_sides, text_sides
from llm2clip.models.sharding import fsdp2_config, set_up_units
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder, Tokenized, encode_tokens
from llm2clip.teacher.llm import shard_encoder
from llm2clip.training.algorithms.batches import InitialImages
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows
from llm2clip.training.optim import build_optimizer

Batch = dict[str, Any]
_AUTOCAST = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}
# Block size of CUDA's caching allocator in bytes.
_BLOCK = 512
# Operations of the models here that autocast computes in float32 on CUDA, but not on a CPU.
_FLOAT32_ON_CUDA = (
    'cumsum', 'exp', 'group_norm', 'layer_norm', 'linalg_vector_norm', 'log', 'log_softmax.int', 'logsumexp',
    'pow.Tensor_Scalar', 'reciprocal', 'rsqrt', 'softmax.int', 'sum', 'sum.dim_IntList',
)


@dataclass
class EncoderPlan:
    """Dry run of a frozen text encoder, which is on the meta device in the data type of its computation."""

    encoder: TextEncoder
    tokens: int  # per caption
    batch_tokens: int  # per forward pass
    precision: str
    sharded: bool = False
    captions_per_image: int = 1

    @property
    def captions(self) -> int:
        """Captions per forward pass."""
        return max(1, self.batch_tokens // self.tokens)

    def run(self) -> None:
        """Run one forward pass."""
        tokens = [Tokenized([1] * self.tokens, 0, 0)] * self.captions
        encode_tokens(self.encoder, tokens, self.batch_tokens, self.precision, self.sharded)

    def dry_run(self) -> 'StepCost':
        """Measure memory and FLOPs of one forward pass."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            fill_with_fakes(self.encoder.eval().requires_grad_(False))
            meter = Meter()
            weights = meter.add_module(self.encoder)
            with meter, as_on_cuda():
                self.run()
        return StepCost(teacher=weights, activations=meter.peak - weights, peak=meter.peak, flops=int(meter.flops))


@dataclass
class StepCost:
    """Memory of one GPU in bytes, and its FLOPs per step."""

    parameters: int = 0  # of the model, or of its shards on this rank
    optimizer: int = 0
    ema: int = 0
    teacher: int = 0
    copy: int = 0  # frozen copy of self-distillation
    gradients: int = 0
    buckets: int = 0  # DDP's copy of the gradients, for averaging
    activations: int = 0  # everything else at the peak
    peak: int = 0
    checkpoint: int = 0  # size of a checkpoint: weights and optimizer state of all GPUs
    flops: int = 0
    recomputed: int = 0  # part of the FLOPs that recomputes to save memory


def dry_run_step(
    model: ComposerModel, config: TrainConfig, make_batch: Callable[[int], Batch], teacher: Optional[EncoderPlan] = None
) -> StepCost:
    """Run a step of a model on the meta device, as rank 0 of `fake_ranks`; the model cannot be used again.

    Optimizer state and gradients of a previous step already exist.  `make_batch` returns a batch of N samples as from
    the loader; `teacher` is the frozen teacher in the loop.
    """
    cost, meter, ranks, fsdp = StepCost(), Meter(), dist.get_world_size(), config.fsdp
    precision = Precision(config.precision or ('fp32' if config.device == 'cpu' else 'amp_fp16'))
    autocast = torch.autocast('cpu', _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)
    device_batch = config.global_train_batch_size // ranks
    microbatch = config.device_train_microbatch_size or device_batch
    distilled = isinstance(config, Stage2Config) and config.self_distillation.enabled
    initial = InitialImages(model.model) if distilled else None  # pyright: ignore[reportArgumentType]
    # Outside FakeTensorMode, because a device mesh needs real tensors.
    mesh = init_device_mesh('cpu', (ranks,)) if ranks > 1 else None
    sharding = None if fsdp is None or mesh is None else fsdp2_config(fsdp)
    if fsdp is not None and sharding is not None:
        sharding.device_mesh = mesh if fsdp.replicate == 1 else init_device_mesh(
            'cpu', (fsdp.replicate, ranks // fsdp.replicate), mesh_dim_names=('replicate', 'shard'))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_with_fakes(model)
        model.train()
        optimizer = build_optimizer(config, model)
        cost.checkpoint = sum(value.nbytes for value in model.state_dict().values())  # stage 1: trainable weights only
        trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        # As in Composer, but without its check of the device, which excludes mixed precision on a CPU.
        if fsdp is not None and fsdp.activation_checkpointing:
            apply_ac(model, True, False, generate_composer_model_check_fn(model))
        if fsdp is not None and sharding is not None:
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
            cost.checkpoint += sum(value.nbytes for state in optimizer.state.values() for value in state.values()
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
    autocast: torch.autocast, meter: 'Meter',
) -> None:
    """Run forward pass, backward pass and optimizer of a batch and its microbatches, in Composer's order."""
    batch, *microbatches = batches
    loss: Any = model.loss
    parts = len(batch['index']) / len(microbatches[0]['index'])
    cached, first = None, {}

    def prepare(part: Batch) -> Batch:
        copied = float_vectors(_copied(part))
        texts = [copied[side + 'input_ids'] for side in text_sides(copied)]
        return pack_sides(copied, [of.shape[1] for of in texts for _ in of]) if texts else copied

    def first_pass(part: Batch) -> Any:
        """Run the model for the first microbatch; return features of the right shape for the others."""
        if not first:
            with meter.counting(parts, again=True):
                first.update(model(part))
            return first
        return {name: value.new_zeros(len(part['index']), *value.shape[1:]) if value.ndim > 1 else value
                for name, value in first.items()}

    if cache and len(microbatches) > 1:
        cached = cache_gradients(first_pass, loss, batch, microbatches, prepare, lambda: autocast)
        first.clear()
    # Keep the gradients if there are several microbatches, because the one that runs adds to them.
    optimizer.zero_grad(set_to_none=len(microbatches) == 1)
    part = prepare(microbatches[0])
    kept = _copied(part)  # Composer keeps it for training metrics
    with autocast, meter.counting(parts):
        outputs = model(part)
        total = loss(outputs, part) if cached is None else surrogate_loss(outputs, part, cached)
    with meter.counting(parts, backward=True):
        total.backward()
    del outputs, total, kept
    optimizer.step()


def _copied(batch: Batch) -> Batch:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of `ranks`, with collectives that return at once; ends an existing process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    launched = os.environ.pop('WORLD_SIZE', None)
    torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.environ.update({} if launched is None else {'WORLD_SIZE': launched})


def fill_with_fakes(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake CPU tensors, inside a FakeTensorMode."""
    fakes: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False, remove_duplicate=False),
                             *module.named_buffers(recurse=False, remove_duplicate=False)):
            if id(tensor) not in fakes:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                fakes[id(tensor)] = (nn.Parameter(fake, requires_grad=tensor.requires_grad)
                                     if isinstance(tensor, nn.Parameter) else fake)
            setattr(module, name, fakes[id(tensor)])


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Make the CPU choose types and kernels as CUDA does: those of autocast, and the dropout that keeps a mask."""
    def in_float32(operation: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast('cpu', enabled=False):
                return operation(*(value.float() if isinstance(value, torch.Tensor) and value.dtype in (
                    torch.bfloat16, torch.float16) else value for value in args), **kwargs)
        return run

    def dropout(values: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        return torch.native_dropout(values, p, train)[0] if train and 0 < p < 1 else values

    with _scoped_library('aten', 'IMPL') as library, warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Warning only once for all operators')
        for name in _FLOAT32_ON_CUDA:
            packet, _, overload = name.partition('.')
            library.impl(name, in_float32(getattr(getattr(torch.ops.aten, packet), overload or 'default')),
                         'AutocastCPU')
        library.impl('dropout', dropout, 'AutogradCPU')
        yield


class Meter(TorchDispatchMode):
    """Measure the memory of tensors and the FLOPs of matrix products, convolutions and attention.

    Reading the value of a fake tensor, which has none, returns True, 1 or 1.0.  Torch's own MemTracker does not support
    frozen parameters, and FlopCounterMode of torch 2.7 has no formula for attention on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0  # bytes of live tensors that were added or made inside, less those that FSDP2 freed
        self.peak = 0  # maximum of `current`
        self.flops = self.recomputed = 0.0  # total, and those of recomputation
        self._sizes: dict[int, int] = {}
        self._times, self._again, self._backward = 1.0, False, False

    def add_module(self, module: nn.Module) -> int:
        """Count the parameters and buffers of a module that was made outside, and return their bytes."""
        before = self.current
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(tensor)
        return self.current - before

    @contextmanager
    def counting(self, times: float = 1.0, again: bool = False, backward: bool = False) -> Iterator[None]:
        """Count the FLOPs of the block several times, as recomputation, or as a backward pass.

        A backward pass runs without gradients itself; only recomputation inside it enables them.
        """
        self._times, self._again, self._backward = times, again, backward
        yield
        self._times, self._again, self._backward = 1.0, False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, aten = func.overloadpacket, torch.ops.aten
        if packet is aten._local_scalar_dense:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value)
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            flops = sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            flops = sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        self.flops += self._times * flops
        if self._again or self._backward and torch.is_grad_enabled():
            self.recomputed += self._times * flops
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = id(storage)  # unique while the storage lives
        if key not in self._sizes:
            self._resize(key, storage.nbytes())
            weakref.finalize(storage, self._resize, key, None).atexit = False

    def _resize(self, key: int, size: Optional[int]) -> None:
        """Update the counted size of a storage; None if it was freed."""
        self.current -= self._sizes.pop(key, 0)
        if size is not None:
            self._sizes[key] = -(-size // _BLOCK) * _BLOCK
            self.current += self._sizes[key]
            self.peak = max(self.peak, self.current)

    def __enter__(self) -> 'Meter':
        self._torch_resize = resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._resize(id(storage), size)
            return result

        torch.UntypedStorage.resize_ = counted  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._torch_resize
        super().__exit__(*error)
