# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Token states -> one vector per text."""

import torch

__all__ = ['POOLINGS', 'last_pool', 'mean_pool', 'weighted_mean_pool']


def mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that `embed_mask` marks.

    Args:
        hidden: ``(B, T, D)``.
        embed_mask: ``(B, T)``, 1 for the caption's own tokens, or any weights.

    Returns:
        ``(B, D)`` in float32.
    """
    weights = embed_mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def weighted_mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Mean in which the caption's i-th token weighs i (SGPT, Muennighoff 2022, eq. 2); shapes as in `mean_pool`."""
    return mean_pool(hidden, embed_mask.cumsum(1) * embed_mask)


def last_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """The last token that `embed_mask` marks; shapes as in `mean_pool`."""
    positions = torch.arange(embed_mask.shape[1], device=embed_mask.device)
    last = (embed_mask * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


POOLINGS = {'mean': mean_pool, 'weighted_mean': weighted_mean_pool, 'last': last_pool}
