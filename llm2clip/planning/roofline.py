# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Time of a step by a roofline: a kernel takes as long as its FLOPs or as the bytes that it reads and writes,
whichever takes longer.

Collectives run beside the kernels.  Gaps between kernels, and waiting for data, do not count.
"""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

_GIB = 2**30
# Share of memory for tensors, beside CUDA's context, NCCL's buffers and fragmentation.
_USABLE = 0.9
# Operations that allocate or reinterpret memory, in addition to those that torch marks as views.
_NO_KERNEL = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'resize_', 'set_',
              '_unsafe_view', '_reshape_alias'}
# Operations that do not read the tensor that they write, and those that read selected rows of a tensor.
_OVERWRITING, _SELECTING = {'copy_', 'fill_', 'zero_'}, {'embedding', 'gather', 'index', 'index_select'}
COLLECTIVES = ('c10d', '_c10d_functional', '_c10d_functional_autograd')


class Kernel(NamedTuple):
    """Work of a kernel."""

    flops: float = 0.0  # of products, convolutions and attention
    size: float = 0.0  # bytes that it reads and writes
    in_16_bits: bool = False  # whether its inputs have 16 bits


class GPU(NamedTuple):
    """Memory and nominal speeds of a GPU, and which part of them kernels reach.

    The best shape of a bfloat16 product reaches 0.8 of an H100's peak and 0.86 of an A100's (MAMF in
    github.com/stas00/ml-engineering).  Other shapes reach less, and FlashAttention-2 0.35 on an H100
    (arXiv 2407.08608).  Large copies reach 0.87 of an H100's bandwidth, smaller and strided ones less.
    """

    memory: float  # GiB, as torch sees it
    bf16: float  # TFLOP/s, dense, accumulated in float32
    fp32: float  # TFLOP/s, without TF32
    bandwidth: float  # TB/s of the memory
    link: float  # TB/s from the other GPUs of a node, in one direction
    reached_flops: float = 0.63
    reached_bandwidth: float = 0.78  # of the memory and of the link

    def fits(self, peak: int) -> bool:
        """Whether `peak` bytes are at most nine tenths of the memory."""
        return peak <= _USABLE * self.memory * _GIB

    def flop_rate(self, kernel: Kernel) -> float:
        """Nominal FLOP/s for the inputs of a kernel."""
        return 1e12 * (self.bf16 if kernel.in_16_bits else self.fp32)

    def busy(self, kernels: Mapping[Kernel, float]) -> tuple[float, float]:
        """Seconds of kernels that run a number of times, and those in which memory is the limit."""
        seconds = memory_bound = 0.0
        for kernel, times in kernels.items():
            computing = kernel.flops / (self.reached_flops * self.flop_rate(kernel))
            moving = kernel.size / (self.reached_bandwidth * self.bandwidth * 1e12)
            seconds += times * max(computing, moving)
            if moving > computing:
                memory_bound += times * moving
        return seconds, memory_bound


# NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 (an eighth of its sums) and L40S; the
# Ada white paper for the RTX 4090.  Links are NVLink or PCIe 4.0 x16.
GPUS = {
    'A100': GPU(79, 312, 19.5, 2.039, 0.3), 'H100': GPU(79, 989, 67, 3.35, 0.45),
    'H200': GPU(139, 989, 67, 4.8, 0.45), 'B200': GPU(178, 2250, 75, 8.0, 0.9),
    'L40S': GPU(44, 362, 91.6, 0.864, 0.032), 'RTX4090': GPU(23.6, 165.2, 82.6, 1.008, 0.032)}


def local_tensors(values: Any) -> list[torch.Tensor]:
    """Return the different tensors in a tree; this rank's shard of those that are sharded."""
    tensors: dict[int, torch.Tensor] = {}
    for value in tree_leaves(values):
        if isinstance(value, DTensor):
            value = value._local_tensor
        if isinstance(value, torch.Tensor):
            tensors[id(value)] = value
    return [*tensors.values()]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Return the bytes that tensors take in memory; an expanded tensor has no more than its storage."""
    return sum(min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()) for tensor in tensors)


def accessed(
    func: Any, args: Any, kwargs: Any, result: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors that an operation reads and those that it writes; none of a view."""
    name = func.overloadpacket.__name__
    if func.is_view or name in _NO_KERNEL:
        return [], []
    arguments = {argument.name: argument for argument in func._schema.arguments}
    read: list[Any] = []
    written: list[Any] = [result]
    for key, value in (dict(zip(arguments, args)) | kwargs).items():
        alias = arguments[key].alias_info
        is_written = alias is not None and alias.is_write
        if is_written:
            written.append(value)
        if not is_written or not (arguments[key].is_out or name in _OVERWRITING):
            read.append(value)
    if name in _SELECTING:
        read[0] = result
    return local_tensors(read), local_tensors(written)


def received_bytes(func: Any, args: Any, ranks: int) -> float:
    """Return the bytes that each rank receives in a collective, in a ring.

    An all-gather or a reduce-scatter moves all shards but one; an all-reduce is both.
    """
    name = func.overloadpacket.__name__
    sizes = [bytes_of([tensor]) for tensor in local_tensors(args)]
    if 'reduce' in name and 'scatter' not in name:
        return 2 * max(sizes) * (ranks - 1) / ranks
    return max(sizes, default=0) - min(sizes, default=0)


class Chain:
    """Operations that a compiler makes one kernel: it reads what was made before, and writes what remains."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, int], int] = {}
        self._made: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def add(self, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        for tensor in read:
            key = id(tensor.untyped_storage())
            if key not in self._made:
                self._read[key, int(tensor.storage_offset())] = bytes_of([tensor])
        for tensor in written:
            storage = tensor.untyped_storage()
            self._made[id(storage)] = weakref.ref(storage), bytes_of([tensor])

    def end(self) -> Kernel:
        """Return the kernel, which writes the storages that are still there, and begin a new chain."""
        kept = sum(size for storage, size in self._made.values() if storage() is not None)
        kernel = Kernel(size=sum(self._read.values()) + kept)
        self._read, self._made = {}, {}
        return kernel
