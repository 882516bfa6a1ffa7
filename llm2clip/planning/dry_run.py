# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dry run of one training step: memory and work of one GPU, from the step of rank 0 on fake tensors.

Model, optimizer, sharding, loss and GradCache are the real ones.  Only one of several equal microbatches
runs.  Fake CPU tensors need neither a GPU nor a CUDA build.  Where memory or FLOPs differ between CPU and
CUDA, the dry run follows CUDA: operations that autocast computes in float32, the mask of dropout,
the FLOPs of attention, the fused optimizer.
"""

import dataclasses
import os
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional, Union
from unittest.mock import patch

import torch
import torch.distributed
import torch.distributed._tools.fake_collectives  # lets collectives run on fake tensors
import torch.nn as nn
from composer.core import Precision
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy, sync_optimizer_and_model_params
from composer.models import ComposerModel
from composer.utils.parallelism import FSDP2Config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.library import _scoped_library
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from llm2clip.config import FsdpConfig, TrainConfig
from llm2clip.data.image_text_dataset import split_columns
from llm2clip.data.text_batches import pack_sides, text_sides
from llm2clip.data.vectors import float_vectors
from llm2clip.modeling import text_encoder
from llm2clip.modeling.text_encoder import TextEncoder, Tokenized, encode_tokens
from llm2clip.models.sharding import fsdp2_config, set_up_units
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.planning.roofline import COLLECTIVES, Chain, Kernel, accessed, bytes_of, received_bytes
from llm2clip.ranks import dist
from llm2clip.teacher.llm import shard_encoder
from llm2clip.training.algorithms.batches import InitialImages
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows
from llm2clip.training.optim import build_optimizer

Batch = dict[str, Any]
_AUTOCAST = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}
# Block size of CUDA's caching allocator in bytes.
_BLOCK = 512
_aten = torch.ops.aten
# Operations of the models here that autocast computes in float32 on CUDA, but not on a CPU.
_FLOAT32_ON_CUDA = (
    _aten.cumsum.default, _aten.exp.default, _aten.group_norm.default, _aten.layer_norm.default,
    _aten.linalg_vector_norm.default, _aten.log.default, _aten.log_softmax.int, _aten.logsumexp.default,
    _aten.pow.Tensor_Scalar, _aten.reciprocal.default, _aten.rsqrt.default, _aten.softmax.int,
    _aten.sum.default, _aten.sum.dim_IntList,
)
# Operation -> formula of its FLOPs.  Torch 2.7 has none for attention on a CPU.
_FLOPS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[_aten._scaled_dot_product_flash_attention_backward],
} | flop_registry


@dataclass
class EncoderPass:
    """Forward pass of a frozen text encoder on the meta device, in the data type of its computation."""

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

    def load(self, meter: 'Meter', mesh: Optional[DeviceMesh] = None) -> int:
        """Replace the weights by fake ones, sharded over `mesh` if `sharded`; return their bytes."""
        self.encoder.eval().requires_grad_(False).to_empty(device='cpu')
        if self.sharded and mesh is not None:
            shard_encoder(self.encoder, mesh)
        return meter.add_module(self.encoder)

    def run(self) -> None:
        """Run one forward pass."""
        tokens = [Tokenized([1] * self.tokens, 0, 0)] * self.captions
        encode_tokens(self.encoder, tokens, self.batch_tokens, self.precision, self.sharded)

    def dry_run(self) -> 'StepCost':
        """Measure memory and work of one forward pass."""
        return _dry_run_pass('teacher', self.load, self.run)


def dry_run_tower(encoder: VisionEncoder, batch_size: int, precision: str) -> 'StepCost':
    """Measure memory and work of one forward pass of a frozen vision tower on the meta device."""
    size = encoder.preprocessing.image_size

    def load(meter: 'Meter') -> int:
        encoder.eval().requires_grad_(False).to_empty(device='cpu')
        return meter.add_module(encoder)

    def run() -> None:
        pixels = torch.empty(batch_size, 3, size, size, dtype=torch.uint8)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, precision == 'amp_bf16'):
            encoder(pixels)

    return _dry_run_pass('parameters', load, run)


def _dry_run_pass(part: str, load: Callable[['Meter'], int], run: Callable[[], None]) -> 'StepCost':
    """Measure memory and work of `run`, a forward pass; `load` returns the bytes of its weights, which
    count as the `part` of the cost."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        meter = Meter()
        weights = load(meter)
        with meter, as_on_cuda():
            run()
    activations = meter.peak - weights
    cost = StepCost(activations=activations, peak=meter.peak)
    setattr(cost, part, weights)
    cost.take_work(meter)
    return cost


@dataclass
class StepCost:
    """Memory of one GPU in bytes, and its work per step."""

    parameters: int = 0  # of the model, or of its shards on this rank
    optimizer: int = 0
    teacher: int = 0
    copy: int = 0  # frozen copy of self-distillation
    gradients: int = 0
    buckets: int = 0  # DDP's copy of the gradients, for averaging
    activations: int = 0  # everything else at the peak
    peak: int = 0
    checkpoint: int = 0  # size of a checkpoint: weights and optimizer state of all GPUs
    flops: int = 0
    recomputed: int = 0  # part of the FLOPs that recomputes to save memory
    kernels: dict[Kernel, float] = field(default_factory=dict)  # how often each runs
    received: float = 0.0  # bytes from other ranks

    def take_work(self, other: Union['Meter', 'StepCost']) -> None:
        """Copy the work of a step."""
        self.flops, self.recomputed = int(other.flops), int(other.recomputed)
        self.kernels, self.received = other.kernels, other.received


def precision_of(config: TrainConfig) -> str:
    """Return the precision of a training, which depends on the device if it is not set."""
    if config.precision:
        return config.precision
    return 'fp32' if config.device == 'cpu' else 'amp_fp16'


def dry_run_step(
    model: ComposerModel, config: TrainConfig, make_batch: Callable[[int], Batch],
    teacher: Optional[EncoderPass] = None,
) -> StepCost:
    """Run a step of a model on the meta device, as rank 0 of `fake_ranks`; the model cannot be used again.

    Optimizer state and gradients of a previous step already exist.  `make_batch` returns a batch of N samples
    as from the loader; `teacher` is the frozen teacher in the loop.
    """
    cost = StepCost()
    meter = Meter(compiled=config.compile is not None)
    ranks = dist.get_world_size()
    precision = Precision(precision_of(config))
    autocast = torch.autocast('cpu', _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)
    device_batch = config.global_train_batch_size // ranks
    microbatch = config.device_train_microbatch_size or device_batch
    uses_grad_cache = 'grad_cache' in config.algorithms
    initial: Optional[InitialImages] = None
    if config.self_distillation.enabled:
        initial = InitialImages(model.model)  # pyright: ignore[reportArgumentType]
    # Outside FakeTensorMode, because a device mesh needs real tensors.
    mesh = init_device_mesh('cpu', (ranks,)) if ranks > 1 else None
    sharding = None if mesh is None or config.fsdp is None else _sharding(config.fsdp, mesh)
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = _prepare_model(model, config, sharding, precision, cost)
        batch = make_batch(device_batch)
        if uses_grad_cache:
            batch = with_rows(batch, model.feature_names)  # pyright: ignore[reportArgumentType]
        batches = [batch, *split_columns(batch, microbatch)]
        cost.parameters = meter.add_module(model)
        if teacher is not None:
            cost.teacher = teacher.load(meter, mesh)
        if initial is not None:
            initial.to_empty(device='cpu')
            if sharding is not None and mesh is not None:
                initial.shard(mesh)
            cost.copy = meter.add_module(initial)
        with meter, as_on_cuda():
            with meter.counting(0):
                _make_training_state(model, optimizer, cost, meter)
            meter.peak = meter.current
            if teacher is not None:
                with meter.counting(device_batch * teacher.captions_per_image / teacher.captions):
                    teacher.run()
            if initial is not None:
                with autocast, meter.counting(device_batch / microbatch):
                    features = initial(batches[1]['pixel_values'].clone())
                for part in batches:
                    part['initial_image_features'] = features.new_zeros(len(part['index']), features.shape[1])
            _run_step(model, optimizer, batches, uses_grad_cache, autocast, meter)
    cost.peak = meter.peak + cost.buckets
    cost.activations = (meter.peak - cost.parameters - cost.optimizer - cost.teacher - cost.copy
                        - cost.gradients)
    cost.take_work(meter)
    if ranks > 1:
        cost.received += 2 * cost.buckets * (ranks - 1) / ranks
    return cost


def _prepare_model(
    model: ComposerModel, config: TrainConfig, sharding: Optional[FSDP2Config], precision: Precision,
    cost: StepCost,
) -> torch.optim.Optimizer:
    """Fill the model with fakes, shard it and return its optimizer; record the sizes in `cost`."""
    model.train().to_empty(device='cpu')  # fake, inside FakeTensorMode
    optimizer = build_optimizer(dataclasses.replace(config, device=config.device or 'gpu'), model)
    # In stage 1, the state dict has only the trainable weights.
    cost.checkpoint = sum(value.nbytes for value in model.state_dict().values())
    if dist.get_world_size() > 1 and sharding is None:
        cost.buckets = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # As in Composer, but without its check of the device, which excludes mixed precision on a CPU.
    if config.fsdp is not None:
        if config.fsdp.activation_checkpointing:
            apply_ac(model, True, False, generate_composer_model_check_fn(model))
        if sharding is not None:
            with sync_optimizer_and_model_params(optimizer, model):
                prepare_fully_shard(model, sharding, precision, generate_composer_model_policy(model))
            set_up_units(model)
    return optimizer


def _sharding(config: FsdpConfig, mesh: DeviceMesh) -> FSDP2Config:
    """Return Composer's configuration of FSDP over the ranks of `mesh`."""
    sharding = fsdp2_config(config)
    sharding.device_mesh = mesh
    if config.replicate > 1:
        sharding.device_mesh = init_device_mesh(
            'cpu', (config.replicate, mesh.size() // config.replicate), mesh_dim_names=('replicate', 'shard'))
    return sharding


def _make_training_state(
    model: ComposerModel, optimizer: torch.optim.Optimizer, cost: StepCost, meter: 'Meter'
) -> None:
    """Make gradients and optimizer state, as after a previous step, and record their sizes in `cost`."""
    without_gradients = meter.current
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with_gradients = meter.current
    optimizer.step()
    cost.gradients = with_gradients - without_gradients
    cost.optimizer = meter.current - with_gradients
    states = tree_leaves([*optimizer.state.values()])
    cost.checkpoint += sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def _run_step(
    model: ComposerModel, optimizer: torch.optim.Optimizer, batches: list[Batch], uses_grad_cache: bool,
    autocast: torch.autocast, meter: 'Meter',
) -> None:
    """Run forward pass, backward pass and optimizer of a batch and its microbatches, in Composer's order."""
    batch, *microbatches = batches
    loss: Any = model.loss
    parts = len(batch['index']) / len(microbatches[0]['index'])
    cached = None
    first: dict[str, Any] = {}

    def prepare(part: Batch) -> Batch:
        copied = float_vectors(tree_map_only(torch.Tensor, torch.clone, part))
        lengths: list[int] = []
        for side in text_sides(copied):
            num_texts, length = copied[side + 'input_ids'].shape
            lengths += [length] * num_texts
        return pack_sides(copied, lengths) if lengths else copied

    def first_pass(part: Batch) -> Any:
        """Run the model for the first microbatch; return features of the right shape for the others."""
        if not first:
            with meter.counting(parts, again=True):
                first.update(model(part))
            return first
        features = dict(first)
        for name, value in first.items():
            if value.ndim > 1:
                features[name] = value.new_zeros(len(part['index']), *value.shape[1:])
        return features

    if uses_grad_cache and len(microbatches) > 1:
        cached = cache_gradients(first_pass, loss, batch, microbatches, prepare, lambda: autocast)
        first.clear()
    # Keep the gradients if there are several microbatches, because the one that runs adds to them.
    optimizer.zero_grad(set_to_none=len(microbatches) == 1)
    part = prepare(microbatches[0])
    kept = tree_map_only(torch.Tensor, torch.clone, part)  # Composer keeps it for training metrics
    with autocast, meter.counting(parts):
        outputs = model(part)
        total = loss(outputs, part) if cached is None else surrogate_loss(outputs, part, cached)
    with meter.counting(parts, backward=True):
        total.backward()
    del outputs, total, kept
    optimizer.step()


@contextmanager
def fake_ranks(ranks: Optional[int]) -> Iterator[None]:
    """Make this process rank 0 of `ranks`, or of as many as there are, with collectives that return at once;
    ends an existing process group."""
    ranks = ranks or dist.get_world_size()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    with patch.dict(os.environ):
        os.environ.pop('WORLD_SIZE', None)
        torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Make the CPU choose types of autocast and kernels as CUDA does: one kernel for the attention of packed
    texts, and a dropout that keeps a mask."""
    def dropout(values: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        if train and 0 < p < 1:
            return torch.native_dropout(values, p, train)[0]
        return values

    with _scoped_library('aten', 'IMPL') as library, warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Warning only once for all operators')
        for operation in _FLOAT32_ON_CUDA:
            library.impl(operation, partial(_in_float32, operation), 'AutocastCPU')
        library.impl('dropout', dropout, 'AutogradCPU')
        with patch.object(text_encoder, 'has_varlen_kernel', lambda device: True):
            yield


def _in_float32(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operation without autocast, with its 16-bit tensors in float32."""
    halves = _AUTOCAST.values()
    values = [value.float() if getattr(value, 'dtype', None) in halves else value for value in args]
    with torch.autocast('cpu', enabled=False):
        return operation(*values, **kwargs)


class Meter(TorchDispatchMode):
    """Measure the memory of tensors, and the work of kernels and collectives.

    Reading the value of a fake tensor, which has none, returns 1.  Torch's own MemTracker does not support
    frozen parameters.
    """

    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        self.current = 0  # bytes of live tensors that were added or made inside, less those that FSDP2 freed
        self.peak = 0  # maximum of `current`
        self.flops = self.recomputed = 0.0  # total, and those of recomputation
        self.kernels: dict[Kernel, float] = defaultdict(float)
        self.received = 0.0  # bytes from other ranks
        self._sizes: dict[int, int] = {}
        self._times, self._again, self._backward = 1.0, False, False
        self._compiled = compiled
        self._fuses = False
        self._chain = Chain()

    def add_module(self, module: nn.Module) -> int:
        """Count the parameters and buffers of a module that was made outside, and return their bytes."""
        before = self.current
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(tensor)
        return self.current - before

    @contextmanager
    def counting(self, times: float = 1.0, again: bool = False, backward: bool = False) -> Iterator[None]:
        """Count the work of the block several times, as recomputation, or as a backward pass.

        A backward pass runs without gradients itself; only recomputation inside it enables them.
        """
        self._times, self._again, self._backward = times, again, backward
        self._fuses = self._compiled
        yield
        self._end_chain()
        self._times, self._again, self._backward = 1.0, False, False
        self._fuses = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return 1
        result = func(*args, **kwargs)
        tree_map_only(torch.Tensor, self._add, result)
        flops = 0.0
        if func.overloadpacket in _FLOPS:
            flops = _FLOPS[func.overloadpacket](*args, **kwargs, out_val=result)
            self.flops += self._times * flops
            if self._again or (self._backward and torch.is_grad_enabled()):
                self.recomputed += self._times * flops
        if func.namespace in COLLECTIVES:
            self.received += self._times * received_bytes(func, args, dist.get_world_size())
        else:
            self._count(flops, *accessed(func, args, kwargs, result))
        return result

    def _count(self, flops: float, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        """Count a kernel, or make it part of one with its neighbours if those are compiled."""
        if self._fuses and not flops:
            self._chain.add(read, written)
            return
        self._end_chain()
        if written:
            in_16_bits = any(tensor.itemsize == 2 for tensor in read)
            self.kernels[Kernel(flops, bytes_of(read) + bytes_of(written), in_16_bits)] += self._times

    def _end_chain(self) -> None:
        kernel = self._chain.end()
        if kernel.size:
            self.kernels[kernel] += self._times

    def _add(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
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
