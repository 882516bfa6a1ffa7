# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fake ranks and fake tensors for a dry run, and what they would take of a GPU.

Fake CPU tensors need neither a GPU nor a CUDA build.  Where a CPU differs in what it keeps in memory or counts, this
module follows the GPU: which operations autocast computes in float32, the mask of dropout, the FLOPs of attention.
"""

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.distributed
import torch.distributed._tools.fake_collectives  # lets collectives run on fake tensors
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.library import _scoped_library
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ['Meter', 'as_on_cuda', 'fake_ranks', 'fill_with_fakes']

# CUDA's caching allocator hands out blocks of this size.
_BLOCK = 512
# What autocast computes in float32 on CUDA, but not on a CPU, as far as the models here use it.
_FLOAT32_ON_CUDA = (
    'cumsum', 'exp', 'group_norm', 'layer_norm', 'linalg_vector_norm', 'log', 'log_softmax.int', 'logsumexp',
    'pow.Tensor_Scalar', 'reciprocal', 'rsqrt', 'softmax.int', 'sum', 'sum.dim_IntList',
)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """This process is rank 0 of `ranks`, whose collectives return at once; a process group that exists already ends."""
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
    """Replace tensors of the meta device by fake CPU tensors; inside a FakeTensorMode."""
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
    """Let the CPU choose types and kernels as CUDA does: those of autocast, and the dropout that keeps a mask."""
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
    """Measures the memory of tensors and the FLOPs of matrix products, convolutions and attention.

    Whoever asks a tensor for its value, which a fake tensor has not, gets yes, 1 or 1.0.  Torch's own MemTracker takes
    no frozen parameters, and its FlopCounterMode has no formula for attention on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0  # bytes of all tensors that were added or made inside, until they are gone or FSDP2 frees them
        self.peak = 0  # the most of them at once
        self.flops = self.recomputed = 0.0  # all, and those that computed something a second time
        self._sizes: dict[int, int] = {}
        self._times, self._again, self._backward = 1.0, False, False

    def add_module(self, module: nn.Module) -> int:
        """Count the parameters and buffers of a module that was made outside; returns their bytes."""
        before = self.current
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(tensor)
        return self.current - before

    @contextmanager
    def counting(self, times: float = 1.0, again: bool = False, backward: bool = False) -> Iterator[None]:
        """FLOPs in the block count several times, as recomputation, or as a backward pass.

        A backward pass itself runs without gradients; only recomputation in it has them.
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
        key = id(storage)  # the same for as long as the storage lives
        if key not in self._sizes:
            self._resize(key, storage.nbytes())
            weakref.finalize(storage, self._resize, key, None).atexit = False

    def _resize(self, key: int, size: Optional[int]) -> None:
        """Count a storage by its new size; None: it is gone."""
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
