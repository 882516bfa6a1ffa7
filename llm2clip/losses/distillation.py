# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Losses that keep features close to target features of the same samples, as in ProCLIP (arXiv 2510.18795).

Like the contrastive losses, they return this rank's part of the loss of the global batch, in float32.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from llm2clip.device import exact_float32
from llm2clip.losses.contrastive import all_gather, with_gradients

# Distances are clamped to this minimum, without gradient: the gradient of a distance is unbounded near zero.
_SMALLEST = 1e-3


def instance_loss(
    features: torch.Tensor, targets: torch.Tensor, counted: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """This rank's part of the mean squared distance between features and targets.

    Args:
        features: ``(B, D)``, L2-normalised, of this rank.
        targets: ``(B, D)``, L2-normalised, without gradient.
        counted: ``(B,)``, mask of samples to include.  None: all.

    Returns:
        A scalar in float32.
    """
    distances = (features.float() - targets.float()).square().sum(1)
    if counted is None:
        return distances.mean()
    counted_everywhere = all_gather(counted.float())
    num_ranks = len(counted_everywhere) / len(counted)
    return (distances * counted).sum() * num_ranks / counted_everywhere.sum().clamp(min=1)


def structure_loss(
    features: torch.Tensor, targets: torch.Tensor, block_size: Optional[int] = None,
    counted: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """This rank's part of the smooth L1 loss between features' and targets' distances, averaged over all
    pairs of samples.

    Args:
        features: ``(B, D)``, L2-normalised, of this rank.
        targets: ``(B, E)``, L2-normalised, without gradient.
        block_size: Rows of the distance matrix that are computed at once.  None: all rows of this rank.
        counted: ``(B,)``, mask of samples to include in pairs.  None: all.

    Returns:
        A scalar in float32.
    """
    if counted is None:
        counted = torch.ones_like(features[:, 0])
    rows = features.float()
    columns = all_gather(rows)
    target_rows = targets.float()
    target_columns = all_gather(target_rows)
    counted_rows = counted.float()
    counted_columns = all_gather(counted_rows)
    block_size = block_size or len(rows)
    with exact_float32(rows.device.type), torch.no_grad():
        total = rows.new_zeros(())
        row_gradient = torch.empty_like(rows)
        column_gradient = torch.zeros_like(columns)
        for start in range(0, len(rows), block_size):
            block = slice(start, start + block_size)
            distance = _distance(rows[block], columns)
            difference = distance - _distance(target_rows[block], target_columns)
            difference *= counted_rows[block, None] * counted_columns
            total += F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction='sum')
            # With distance = sqrt(2 - 2 * product), its derivative by the product is -1 / distance.
            gradient = difference.clamp_(-1, 1).div_(distance).neg_().masked_fill_(distance <= _SMALLEST, 0)
            row_gradient[block] = gradient @ columns
            column_gradient.addmm_(gradient.T, rows[block])
        num_ranks = len(columns) / len(rows)
        num_counted = counted_columns.sum()
        num_pairs = num_counted * (num_counted - 1)  # a sample with itself is not a pair
        mean = num_ranks / num_pairs.clamp(min=1)
        loss = total * mean
        gradients = (row_gradient.mul_(mean), column_gradient.mul_(mean))
    return with_gradients(loss, (rows, columns), gradients)


def _distance(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return (2 - 2 * rows @ columns.T).clamp_(min=_SMALLEST ** 2).sqrt_()
