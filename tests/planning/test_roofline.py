# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Bytes of operations and collectives, and the time of kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llm2clip.config import PlanConfig
from llm2clip.planning.dry_run import Meter, StepCost, fake_ranks
from llm2clip.planning.plan import Plan
from llm2clip.planning.roofline import GPU, GPUS, Kernel

N = 64
SQUARE = 4 * N * N  # bytes
aten: Any = torch.ops.aten


def metered(run: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Meter:
    with FakeTensorMode():
        tensors = [torch.empty(*shape, dtype=dtype) for shape in shapes]
        with Meter() as meter:
            run(*tensors)
    return meter


def size(run: Callable[..., object], *shapes: tuple[int, ...]) -> float:
    return sum(times * kernel.size for kernel, times in metered(run, *shapes).kernels.items())


@pytest.mark.parametrize(('run', 'squares'), [
    (lambda a, b: a @ b, 3),
    (lambda a, b: a + b, 3),
    (lambda a, b: a * a, 2),
    (lambda a, b: a.add_(b), 3),
    (lambda a, b: a.copy_(b), 2),
    (lambda a, b: a.zero_(), 1),
    (lambda a, b: torch.mul(a, a, out=b), 2),
    (lambda a, b: a.t()[1:].unflatten(1, (2, -1)).detach().expand(3, -1, -1, -1), 0),
    (lambda a, b: torch.empty_like(a), 0),
    (lambda a, b: a.bfloat16(), 1.5),
    (lambda a, b: a[:N // 2].clone(), 1),
    (lambda a, b: aten._foreach_add_([a, b], [b, a]), 4),
    (lambda a, b: aten._foreach_mul([a, b], 2), 4),
])
def test_bytes_of_operations(run: Any, squares: float) -> None:
    assert size(run, (N, N), (N, N)) == squares * SQUARE


def test_bytes_of_layers() -> None:
    states = 2, 4, N, 16
    assert size(lambda x, w: F.layer_norm(x, (N,), w), (N, N), (N,)) == 2 * SQUARE + 4 * N + 2 * 4 * N  # mean and rstd
    assert size(lambda w: F.embedding(torch.zeros(8, dtype=torch.long), w), (N, N)) == 2 * 8 * 4 * N + 2 * 8 * 8
    attention = size(lambda *qkv: F.scaled_dot_product_attention(*qkv), states, states, states)
    statistics = 4 * 2 * 4 * N
    assert attention == 4 * 4 * 2 * 4 * N * 16 + statistics


def test_collectives_at_pretended_ranks() -> None:
    def gather(whole: torch.Tensor, own: torch.Tensor) -> None:
        torch.distributed.all_gather_into_tensor(whole, own)

    def scatter(whole: torch.Tensor, own: torch.Tensor) -> None:
        torch.distributed.reduce_scatter_tensor(own, whole)

    for ranks in (2, 8):
        whole = ranks * 4 * N
        with fake_ranks(ranks):
            for run, passes in ((gather, 1), (scatter, 1), (lambda x, _: torch.distributed.all_reduce(x), 2)):
                meter = metered(run, (ranks * N,), (N,))
                assert meter.received == passes * whole * (ranks - 1) / ranks and not meter.kernels


def test_compiled_chains() -> None:
    """One kernel reads what came from outside, and writes what is used later."""
    def run(a: torch.Tensor, b: torch.Tensor) -> None:
        y = ((a * 2 + b).relu() + a) @ b
        y.exp().sum()

    with FakeTensorMode():
        a, b = torch.empty(N, N), torch.empty(N, N)
        with Meter(compiled=True) as meter, meter.counting(3):
            run(a, b)
    flops = 2 * N**3
    assert meter.kernels == {Kernel(0, 3 * SQUARE): 3, Kernel(flops, 3 * SQUARE): 3, Kernel(0, SQUARE): 3}


def test_the_time_of_two_operations() -> None:
    gpu = GPU(80, 100, 10, 2, 0.5, reached_flops=0.5, reached_bandwidth=0.8)
    kernels: dict[Kernel, float] = {Kernel(1e12, 1e9, in_16_bits=True): 3, Kernel(1e9, 2e12): 0.5}
    product, other = 3 * 1 / 50, 0.5 * 2 / 1.6
    assert gpu.busy(kernels) == pytest.approx((product + other, other))
    plan = Plan(PlanConfig(), 2, cost=StepCost(kernels=kernels))
    assert plan.seconds(gpu) == pytest.approx(product + other)
    plan.cost.received = 0.8e12  # beside the kernels
    assert plan.seconds(gpu) == pytest.approx(0.8 / 0.4)
    plan.options.plan_mfu = 0.25
    assert plan.seconds(gpu) == pytest.approx((3 * 1 / 100 + 0.5 * 1e-3 / 10) / 0.25)


def test_the_dtype_decides_the_peak() -> None:
    for dtype, peak in ((torch.bfloat16, GPUS['H100'].bf16), (torch.float32, GPUS['H100'].fp32)):
        kernel, = metered(lambda a: a @ a, (N, N), dtype=dtype).kernels
        assert GPUS['H100'].flop_rate(kernel) == peak * 1e12
