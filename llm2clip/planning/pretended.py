# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ranks and GPUs that are not there: collectives without peers, tensors without content, and what they would take.

Everything runs on fake CPU tensors, which need neither a GPU nor a CUDA build.  What a CPU does otherwise than a GPU,
and what it means for memory and FLOPs, is put right here: which operations autocast computes in float32, what dropout
keeps for the backward pass, and the FLOPs of attention.
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
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.library import _scoped_library
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ['Flops', 'Memory', 'NoValues', 'as_on_cuda', 'pretended_ranks', 'without_content']

# CUDA's caching allocator hands out blocks of this size.
_BLOCK = 512
# What autocast computes in float32 on CUDA, but not on a CPU, as far as the models here use it.
_FLOAT32_ON_CUDA = (
    'cumsum', 'exp', 'group_norm', 'layer_norm', 'linalg_vector_norm', 'log', 'log_softmax.int', 'logsumexp',
    'pow.Tensor_Scalar', 'reciprocal', 'rsqrt', 'softmax.int', 'sum', 'sum.dim_IntList',
)


@contextmanager
def pretended_ranks(ranks: int) -> Iterator[Optional[DeviceMesh]]:
    """This process is rank 0 of `ranks`, whose collectives return at once; yields a mesh of all of them.

    Process groups that are there already, and what a launcher says of this rank, are put aside.
    """
    environment = {'WORLD_SIZE': str(ranks), 'RANK': '0'}
    said = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    groups, outside = distributed_c10d._world.pg_map, distributed_c10d._world.default_pg
    there = set(groups)
    distributed_c10d._update_default_pg(None)
    torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh('cpu', (ranks,)) if ranks > 1 else None
    finally:
        distributed_c10d._update_default_pg(outside)
        for group in set(groups) - there:
            torch.distributed.destroy_process_group(group)
        for name, value in said.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def without_content(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device; inside a FakeTensorMode."""
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


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let the CPU choose types and kernels as CUDA does: those of autocast, and the dropout that keeps a mask."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(operation: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(key):
                return operation(*map(_widened, args), **kwargs)
        return run

    with _scoped_library('aten', 'IMPL') as library, warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Warning only once for all operators')
        for name in _FLOAT32_ON_CUDA:
            packet, _, overload = name.partition('.')
            library.impl(name, in_float32(getattr(getattr(torch.ops.aten, packet), overload or 'default')),
                         'AutocastCPU')
        library.impl('dropout', _dropout, 'AutogradCPU')
        yield


def _dropout(values: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return torch.native_dropout(values, p, train)[0] if train and 0 < p < 1 else values


def _widened(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


class Memory(TorchDispatchMode):
    """Bytes that tensors take at once: all that are given or made inside, until they are gone or FSDP2 frees them.

    Torch's own `MemTracker` wants every parameter trained and each module run once.
    """

    def __init__(self, module: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}
        if module is not None:
            self.add_module(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return result

    def add_module(self, module: nn.Module) -> None:
        """Count the parameters and buffers of a module that was made outside."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self._grow(-self._sizes.pop(key))

        self._alive[key] = weakref.ref(storage, gone)
        self._sizes[key] = _in_blocks(storage.nbytes())
        self._grow(self._sizes[key])

    def _grow(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)

    def __enter__(self) -> 'Memory':
        self._resize = resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if (key := storage._cdata) in self._alive:
                before, self._sizes[key] = self._sizes[key], _in_blocks(size)
                self._grow(self._sizes[key] - before)
            return result

        torch.UntypedStorage.resize_ = counted  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)


def _in_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


class Flops(TorchDispatchMode):
    """Floating-point operations of matrix products, convolutions and attention, by torch's own formulas.

    Attributes:
        total: All of them.
        again: Those that computed something a second time.
        attention: Those of attention, its projections left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.again = self.attention = 0.0
        self._times, self._again, self._backward = 1.0, False, False

    @contextmanager
    def counted(self, times: float = 1.0, again: bool = False, backward: bool = False) -> Iterator[None]:
        """What runs in the block counts several times, as computed again, or as a backward pass.

        A backward pass itself needs no gradients; what it computes again does.
        """
        before = self._times, self._again, self._backward
        self._times, self._again, self._backward = times, again, backward
        try:
            yield
        finally:
            self._times, self._again, self._backward = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self._add(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self._add(sdpa_flop_count(*(tensor.shape for tensor in args[:3])), attention=True)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self._add(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])), attention=True)
        return result

    def _add(self, flops: float, attention: bool = False) -> None:
        flops *= self._times
        self.total += flops
        self.again += flops * (self._again or (self._backward and torch.is_grad_enabled()))
        self.attention += flops * attention


class NoValues(TorchDispatchMode):
    """Answers those who ask a tensor without content for its value: with yes, 1 or 1.0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.aten._local_scalar_dense:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))
