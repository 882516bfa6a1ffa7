# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Rows of all ranks."""

from typing import Any

import torch
import torch.distributed

__all__ = ['all_gather', 'first_row']


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def all_gather(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's rows along the first axis, with gradient to each of them.

    The gradient of a rank's own rows is the sum over the ranks' losses.  When the training averages parameter gradients
    over ranks, as DDP and FSDP do, the result is the gradient of the losses' mean over the ranks.

    Args:
        rows: ``(B, …)``, the same shape on every rank.

    Returns:
        ``(B * world_size, …)``, in the order of the ranks.
    """
    return rows if _alone() else _AllGather.apply(rows)  # pyright: ignore[reportReturnType]


def first_row(rows: torch.Tensor) -> int:
    """Where this rank's rows begin in what `all_gather` returns."""
    return 0 if _alone() else torch.distributed.get_rank() * len(rows)


class _AllGather(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gathered = rows.new_empty(len(rows) * torch.distributed.get_world_size(), *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = grad.new_empty(len(grad) // torch.distributed.get_world_size(), *grad.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, grad.contiguous())
        return own
