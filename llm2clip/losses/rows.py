# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The losses of some rows of a logit matrix with all of its columns, and their gradients, in blocks of rows.

The logits are the products of `rows` and `columns` times `scale`.  Each row has K partners among the columns: those of
row i begin at column ``(first + i) * K``.  A row has to find each of its partners without the others, among the columns
of other rows.  With several ranks, each has the rows of its own samples and the columns of all.

Gradients are computed together with the value: the backward pass only multiplies them by what comes from above.  So
one block of logits is held at a time, and every matrix product is in float32 without TF32.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
import torch.distributed

from llm2clip.device import in_float32

__all__ = ['Ignored', 'all_gather', 'first_row', 'partners_of', 'sigmoid_loss', 'softmax_loss', 'with_gradients']

Ignored = Callable[[int, int], torch.Tensor]
"""(start, stop) -> ``(stop - start, C)``, which columns are left out of rows start to stop; never a partner."""


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def all_gather(rows: torch.Tensor) -> torch.Tensor:
    """Every rank's rows ``(B, …)``, of one shape, in the order of the ranks: ``(B * world_size, …)``.

    The gradient of a rank's own rows is the sum over the ranks' losses.  Averaged over ranks, as DDP and FSDP do with
    the parameters' gradients, it is that of the losses' mean.
    """
    return rows if _alone() else _AllGather.apply(rows)  # pyright: ignore[reportReturnType]


def first_row(rows: torch.Tensor) -> int:
    """Where this rank's rows begin in what `all_gather` returns."""
    return 0 if _alone() else torch.distributed.get_rank() * len(rows)


def partners_of(matrix: torch.Tensor, first: int, partners: int = 1) -> torch.Tensor:
    """What a matrix ``(R, C)``, a block of rows with all columns, holds for its rows and their own K partners: a view
    ``(K, R)`` that can be written to.  `first` is the place of the first row among all."""
    n = len(matrix)
    return matrix[:, first * partners:(first + n) * partners].unflatten(1, (n, partners)).diagonal()


@in_float32
def softmax_loss(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    first: int = 0,
    back: Optional[int] = None,
    label_smoothing: float = 0.0,
    ignored: Optional[Ignored] = None,
    block_size: Optional[int] = None,
    partners: int = 1,
) -> torch.Tensor:
    """Cross-entropy from each row to each of its partners among the columns, and back.

    In two passes over the blocks: the sums of rows and columns, then the gradients.

    Args:
        rows, columns: ``(B, D)`` and ``(C, D)``.
        scale: Factor on the products, of one element.
        first: Place of the first row among the rows of all ranks.
        back: The columns before this one are the partners of all ranks' rows: average with the cross-entropy from each
            of them to its row.  None: only from row to column.
        label_smoothing: Share of a label that is spread evenly over all columns that are not ignored.
        ignored: Columns that are left out.
        block_size: Rows of the logit matrix at once.  None: all.
        partners: K, of each row.

    Returns:
        The mean over rows and their partners, and over both directions, a scalar in float32.
    """
    inputs = rows.float(), columns.float(), scale.float()
    with torch.no_grad():
        logits = _Logits(*inputs, ignored, block_size)
        own, row_sum, column_sum, row_count, column_count = _sums(logits, first, back or 0, partners)
        right = (1 - label_smoothing) * own
        total, directions = (row_sum - right).sum() / partners, 1
        # What stands for a row's sums, one for each partner, where a column is none of them.
        mean_sum = math.log(partners) - (-row_sum).logsumexp(0)
        if back is not None:
            # A column's sum goes over the rows of all ranks.
            column_sum = all_gather(column_sum).view(-1, back).logsumexp(0)
            column_count = all_gather(column_count).view(-1, back).sum(0)
            sums = column_sum[first * partners:first * partners + right.numel()].view(-1, partners).T
            total, directions = total + (sums - right).sum() / partners, 2
        products = _Products(logits)
        for block, values, hidden in logits:
            # Of the sum over rows and directions, with respect to the logits.
            gradient = (values - mean_sum[block, None]).exp_()
            gradient_of_own = partners_of(gradient, first + block.start, partners)
            gradient_of_own.copy_((own[:, block] - row_sum[:, block]).exp_().div_(partners))
            if label_smoothing:
                weight = (label_smoothing / row_count[block, None]).repeat(1, values.shape[1])
                partners_of(weight, first + block.start, partners).div_(partners)
                if back is not None:
                    weight[:, :back] += label_smoothing / (column_count * partners)
                if hidden is not None:
                    weight.masked_fill_(hidden, 0)
                total = total - (weight * values.masked_fill(values == -torch.inf, 0)).sum()
                gradient -= weight
            if back is not None:
                gradient[:, :back] += values[:, :back].sub_(column_sum + math.log(partners)).exp_()
            gradient_of_own.sub_(directions * (1 - label_smoothing) / partners)
            products.add(block, gradient)
        mean = 1 / (directions * len(rows))
        gradients = products.gradients(mean)
    return with_gradients(total * mean, inputs, gradients)


def _sums(logits: '_Logits', first: int, back: int, partners: int) -> tuple[torch.Tensor, ...]:
    """The rows' logits with their partners ``(K, B)``; ``log(sum(exp(logits)))`` of each row with one partner and no
    other ``(K, B)``, and of the first `back` columns; of how many logits the sums are, ``(B,)`` and ``(back,)``."""
    b, c = len(logits.rows), len(logits.columns)
    new = logits.rows.new_full
    own, row_sum, column_sum = new((partners, b), 0.0), new((partners, b), 0.0), new((back,), -torch.inf)
    row_count, column_count = new((b,), c - partners + 1), new((back,), b)
    for block, values, hidden in logits:
        if back:
            column_sum = torch.logaddexp(column_sum, values[:, :back].logsumexp(0))
        own_values = partners_of(values, first + block.start, partners)
        own[:, block] = own_values
        own_values.fill_(-torch.inf)
        row_sum[:, block] = torch.logaddexp(values.logsumexp(1), own[:, block])
        own_values.copy_(own[:, block])
        if hidden is not None:
            row_count[block] -= hidden.sum(1)
            column_count -= hidden[:, :back].sum(0)
    return own, row_sum, column_sum, row_count, column_count


@in_float32
def sigmoid_loss(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    first: int = 0,
    ignored: Optional[Ignored] = None,
    block_size: Optional[int] = None,
    partners: int = 1,
) -> torch.Tensor:
    """A binary decision for each pair of a row and a column: are they partners?  In one pass over the blocks.

    Args:
        rows, columns, scale, first, ignored, block_size, partners: As for `softmax_loss`.
        bias: Added to the logits, of one element.

    Returns:
        The sum over the pairs divided by the number of rows and of a row's partners, a scalar in float32.
    """
    inputs = rows.float(), columns.float(), scale.float(), bias.float()
    with torch.no_grad():
        logits = _Logits(*inputs[:3], ignored, block_size)
        products = _Products(logits)
        total, bias_gradient = rows.new_zeros(()), rows.new_zeros(())
        for block, values, _ in logits:
            values.add_(inputs[3])
            partners_of(values, first + block.start, partners).neg_()
            total += torch.nn.functional.softplus(values).sum()
            gradient = values.sigmoid_()
            partners_of(gradient, first + block.start, partners).neg_()
            products.add(block, gradient)
            bias_gradient += gradient.sum()
        mean = 1 / (len(rows) * partners)
        gradients = (*products.gradients(mean), bias_gradient * mean)
    return with_gradients(total * mean, inputs, gradients)


class _Logits:
    """Logits a block of rows at a time, minus infinity where they are ignored; a single block is kept.

    Iterating gives the rows, their logits ``(R, C)``, which the last pass may overwrite, and what is ignored.
    """

    def __init__(
        self, rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, ignored: Optional[Ignored],
        block_size: Optional[int],
    ) -> None:
        self.rows, self.columns, self.scale = rows.detach(), columns.detach(), scale.detach()
        self.ignored = ignored
        self.block_size = block_size or len(rows)
        self._kept: Optional[tuple[torch.Tensor, Optional[torch.Tensor]]] = None

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, Optional[torch.Tensor]]]:
        for start in range(0, len(self.rows), self.block_size):
            block = slice(start, min(start + self.block_size, len(self.rows)))
            values, hidden = self._kept or self._compute(block)
            if self.block_size >= len(self.rows):
                self._kept = values, hidden
            yield block, values, hidden

    def _compute(self, block: slice) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        values = (self.rows[block] @ self.columns.T).mul_(self.scale)
        if self.ignored is None:
            return values, None
        hidden = self.ignored(block.start, block.stop)
        return values.masked_fill_(hidden, -torch.inf), hidden


class _Products:
    """The gradient of the logits, multiplied with rows and columns block by block."""

    def __init__(self, logits: _Logits) -> None:
        self.logits = logits
        self.row_gradient, self.column_gradient = torch.empty_like(logits.rows), torch.zeros_like(logits.columns)

    def add(self, block: slice, gradient: torch.Tensor) -> None:
        self.row_gradient[block] = gradient @ self.logits.columns
        self.column_gradient.addmm_(gradient.T, self.logits.rows[block])

    def gradients(self, mean: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """With respect to rows, columns and scale, times `mean`."""
        # The sum of all logits' derivatives by `scale` times their gradients is that of rows and their products.
        of_scale = (self.logits.rows * self.row_gradient).sum() * mean
        factor = self.logits.scale * mean
        return self.row_gradient.mul_(factor), self.column_gradient.mul_(factor), of_scale


def with_gradients(
    value: torch.Tensor, inputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """A value of one element, as a scalar, whose gradients with respect to the inputs are these."""
    shaped = tuple(gradient.view_as(tensor) for gradient, tensor in zip(gradients, inputs, strict=True))
    return _WithGradients.apply(value.sum(), shaped, *inputs)  # pyright: ignore[reportReturnType]


class _WithGradients(torch.autograd.Function):

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, value: torch.Tensor, gradients: tuple[torch.Tensor, ...], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)


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
