# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The losses of some rows of a logit matrix with all of its columns, and their gradients, in blocks of rows.

The logits are the products of `rows` and `columns` times `scale`; the partner of row i is column ``first + i``.  With
several ranks, each has the rows of its own samples and the columns of all: the mean over ranks of what a function here
returns is the loss of the whole matrix, and the mean over ranks of the parameters' gradients, as DDP and FSDP compute
it, is its gradient.

Gradients are computed together with the value: the backward pass only multiplies them by what comes from above.  So
one block of logits is held at a time, and every matrix product is in float32 without TF32.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch

from llm2clip.float32 import in_float32
from llm2clip.losses.gather import all_gather

__all__ = ['sigmoid_loss', 'softmax_loss']

Ignored = Callable[[int, int], torch.Tensor]
"""(start, stop) -> ``(stop - start, C)``, which columns are left out of rows start to stop; never a partner."""


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
) -> torch.Tensor:
    """Cross-entropy from each row to its partner among the columns, and back.

    In two passes over the blocks: the sums of rows and columns, then the gradients.

    Args:
        rows: ``(B, D)``.
        columns: ``(C, D)``.
        scale: Factor on the products, of one element.
        first: Column of the first row's partner.
        back: The columns before this one are the partners of all ranks' rows: average with the cross-entropy from each
            of them to its row.  None: only from row to column.
        label_smoothing: Share of a label that is spread evenly over all columns that are not ignored.
        ignored: Columns that are left out.
        block_size: Rows of the logit matrix at once.  None: all.

    Returns:
        The mean over rows, and over both directions, a scalar in float32.
    """
    inputs = rows.float(), columns.float(), scale.float()
    with torch.no_grad():
        rows, columns, scale = (value.detach() for value in inputs)
        b, c = len(rows), len(columns)
        blocks = _blocks(b, block_size)

        def logits_of(start: int, stop: int) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
            logits = (rows[start:stop] @ columns.T).mul_(scale)
            if ignored is None:
                return logits, None
            hidden = ignored(start, stop)
            return logits.masked_fill_(hidden, -torch.inf), hidden

        logits, hidden = rows.new_empty(0), None
        row_sum = rows.new_empty(b)
        column_sum = rows.new_full((back or 0,), -torch.inf)
        row_count, column_count = rows.new_full((b,), c), rows.new_zeros(back or 0)
        for start, stop in blocks:
            logits, hidden = logits_of(start, stop)
            row_sum[start:stop] = logits.logsumexp(1)
            if back is not None:
                column_sum = torch.logaddexp(column_sum, logits[:, :back].logsumexp(0))
                column_count += stop - start
            if hidden is not None and label_smoothing:
                row_count[start:stop] -= hidden.sum(1)
                column_count -= hidden[:, :len(column_count)].sum(0)
        own = slice(first, first + b)
        right = scale * (rows * columns[own]).sum(1)
        directions, total = 1, row_sum.sum()
        if back is not None:
            # A column's sum goes over the rows of all ranks.
            column_sum = all_gather(column_sum).view(-1, back).logsumexp(0)
            column_count = all_gather(column_count).view(-1, back).sum(0)
            directions, total = 2, total + column_sum[own].sum()
        total = total - directions * (1 - label_smoothing) * right.sum()

        row_gradient, column_gradient = torch.empty_like(rows), torch.zeros_like(columns)
        for start, stop in blocks:
            if len(blocks) > 1:
                logits, hidden = logits_of(start, stop)
            # Gradient of the sum over rows and directions with respect to the logits.
            gradient = (logits - row_sum[start:stop, None]).exp_()
            if label_smoothing:
                weight = (label_smoothing / row_count[start:stop, None]).repeat(1, c)
                if back is not None:
                    weight[:, :back] += label_smoothing / column_count
                if hidden is not None:
                    weight.masked_fill_(hidden, 0)
                total = total - (weight * logits.masked_fill(logits == -torch.inf, 0)).sum()
                gradient -= weight
            if back is not None:
                gradient[:, :back] += logits[:, :back].sub_(column_sum).exp_()
            gradient.diagonal(first + start).sub_(directions * (1 - label_smoothing))
            row_gradient[start:stop] = gradient @ columns
            column_gradient.addmm_(gradient.T, rows[start:stop])
        mean = 1 / (directions * b)
        value, gradients = total * mean, _gradients(rows, row_gradient, column_gradient, scale, mean)
    return _with_gradients(value, inputs, gradients)


@in_float32
def sigmoid_loss(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    first: int = 0,
    ignored: Optional[Ignored] = None,
    block_size: Optional[int] = None,
) -> torch.Tensor:
    """A binary decision for each pair of a row and a column: are they partners?  In one pass over the blocks.

    Args:
        rows: ``(B, D)``.
        columns: ``(C, D)``.
        scale: Factor on the products, of one element.
        bias: Added to the logits, of one element.
        first: Column of the first row's partner.
        ignored: Columns that are left out.
        block_size: Rows of the logit matrix at once.  None: all.

    Returns:
        The sum over the pairs divided by the number of rows, a scalar in float32.
    """
    inputs = rows.float(), columns.float(), scale.float(), bias.float()
    with torch.no_grad():
        rows, columns, scale, bias = (value.detach() for value in inputs)
        b = len(rows)
        total, bias_gradient = rows.new_zeros(1), rows.new_zeros(1)
        row_gradient, column_gradient = torch.empty_like(rows), torch.zeros_like(columns)
        for start, stop in _blocks(b, block_size):
            logits = (rows[start:stop] @ columns.T).mul_(scale).add_(bias)
            logits.diagonal(first + start).neg_()
            if ignored is not None:
                logits.masked_fill_(ignored(start, stop), -torch.inf)
            total += torch.nn.functional.softplus(logits).sum()
            gradient = logits.sigmoid_()
            gradient.diagonal(first + start).neg_()
            row_gradient[start:stop] = gradient @ columns
            column_gradient.addmm_(gradient.T, rows[start:stop])
            bias_gradient += gradient.sum()
        gradients = (*_gradients(rows, row_gradient, column_gradient, scale, 1 / b), bias_gradient / b)
    return _with_gradients(total / b, inputs, gradients)


def _blocks(rows: int, block_size: Optional[int]) -> list[tuple[int, int]]:
    size = block_size or rows
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _gradients(
    rows: torch.Tensor, row_gradient: torch.Tensor, column_gradient: torch.Tensor, scale: torch.Tensor, mean: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With respect to rows, columns and scale, from the products of the logits' gradient with columns and rows."""
    # The sum of all logits' derivatives by `scale` times their gradients is that of `rows` and `row_gradient`.
    of_scale = (rows * row_gradient).sum() * mean
    return row_gradient.mul_(scale * mean), column_gradient.mul_(scale * mean), of_scale


def _with_gradients(
    value: torch.Tensor, inputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    shaped = tuple(gradient.view_as(tensor) for gradient, tensor in zip(gradients, inputs, strict=True))
    return _WithGradients.apply(value.sum(), shaped, *inputs)  # pyright: ignore[reportReturnType]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to the inputs are known."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, value: torch.Tensor, gradients: tuple[torch.Tensor, ...], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)
