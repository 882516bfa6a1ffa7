# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Contrastive losses over the global batch: pure functions of features, in float32 also under autocast."""

import functools
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
import torch.distributed
import torch.distributed.nn
import torch.nn.functional as F

__all__ = ['all_gather', 'clip_loss', 'ignored_candidates', 'in_float32', 'info_nce', 'same_text', 'siglip_loss']


def all_gather(features: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's features along the first axis, with gradient to each of them.

    The gradient of a rank's own rows is the sum over the ranks' losses. When every rank computes the loss of the whole
    global batch and the training averages parameter gradients over ranks, as DDP and FSDP do, the result is the
    gradient of that loss.

    Args:
        features: ``(B, D)``, the same shape on every rank.

    Returns:
        ``(B * world_size, D)``, in the order of the ranks.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return features
    return torch.cat(torch.distributed.nn.all_gather(features.contiguous()))


def in_float32(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Run a loss outside autocast, which would round its logits, up to 100, to the 8 bits of bfloat16."""

    @functools.wraps(loss)
    def run(features: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return loss(features, *args, **kwargs)

    return run


@in_float32
def clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    label_smoothing: float = 0.0,
    text_id: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    Args:
        image_features: ``(N, D)``, L2-normalised, of the whole global batch.
        text_features: ``(N, D)``, L2-normalised; row i belongs to image i.
        logit_scale: The factor on the cosine similarities, in log space.
        label_smoothing: Share of a label that is spread evenly over all candidates.
        text_id: ``(N,)``; samples of the same id are not each other's negatives.

    Returns:
        The mean over both directions, a scalar in float32.
    """
    logits = logit_scale.float().exp() * image_features.float() @ text_features.float().T
    ignored = None if text_id is None else same_text(text_id, text_id)
    return (_cross_entropy(logits, label_smoothing, ignored) + _cross_entropy(logits.T, label_smoothing, ignored)) / 2


def _cross_entropy(logits: torch.Tensor, label_smoothing: float, ignored: Optional[torch.Tensor]) -> torch.Tensor:
    """Cross-entropy ``(N, N)`` -> scalar, labels on the diagonal, over the candidates that are not ignored."""
    if ignored is None:
        labels = torch.arange(len(logits), device=logits.device)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = logits.masked_fill(ignored, -torch.inf).logsumexp(1)
    mean = logits.masked_fill(ignored, 0).sum(1) / (~ignored).sum(1)
    return (total - (1 - label_smoothing) * logits.diagonal() - label_smoothing * mean).mean()


@in_float32
def siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    text_id: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Pairwise sigmoid loss of SigLIP (Zhai et al. 2023, algorithm 1).

    Args:
        image_features: ``(N, D)``, L2-normalised, of the whole global batch.
        text_features: ``(N, D)``, L2-normalised; row i belongs to image i.
        logit_scale: The factor on the cosine similarities, in log space.
        logit_bias: Added to each logit.
        text_id: ``(N,)``; samples of the same id are not each other's negatives.

    Returns:
        The sum over all pairs divided by N, a scalar in float32.
    """
    logits = logit_scale.float().exp() * image_features.float() @ text_features.float().T + logit_bias.float()
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    losses = -F.logsigmoid(signs * logits)
    if text_id is not None:
        losses = losses.masked_fill(same_text(text_id, text_id), 0)
    return losses.sum() / len(logits)


def same_text(rows: torch.Tensor, columns: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Which columns have the text of a row but are not its own: ``(R,)`` and ``(C,)`` ids -> ``(R, C)``.

    Args:
        rows: Ids.
        columns: Ids; row i is column ``first + i``.
        first: Column of the first row.
    """
    same = rows[:, None] == columns
    same.diagonal(first).fill_(False)
    return same


def ignored_candidates(
    query_id: torch.Tensor,
    positive_id: torch.Tensor,
    negative_id: Optional[torch.Tensor] = None,
    equal_texts: bool = True,
) -> torch.Tensor:
    """Which candidates of a query are no negatives.

    They are hard negatives that a sample does not have and, with `equal_texts`, those whose pair has a text in common
    with the query's pair.

    Args:
        query_id: ``(N,)``; equal ids stand for equal texts.
        positive_id: ``(N,)``.
        negative_id: ``(M,)`` of the hard negatives; 0 where there is none.
        equal_texts: Whether equal texts count.

    Returns:
        ``(N, N + M)``, False on the diagonal.
    """
    q, p = query_id[:, None], positive_id[:, None]
    shared = (q == query_id) | (q == positive_id) | (p == query_id) | (p == positive_id)
    shared.fill_diagonal_(False)
    shared &= equal_texts
    if negative_id is None:
        return shared
    equal = ((q == negative_id) | (p == negative_id)) & equal_texts
    return torch.cat([shared, equal | (negative_id == 0)], dim=1)


@in_float32
def info_nce(
    query: torch.Tensor,
    positive: torch.Tensor,
    negative: Optional[torch.Tensor] = None,
    scale: Union[float, torch.Tensor] = 50.0,
    symmetric: bool = False,
    ignored: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Supervised contrastive loss of stage 1 (LLM2CLIP section 3.1).

    Args:
        query: ``(N, D)`` embeddings of the global batch.
        positive: ``(N, D)``; row i is the positive of query i and a negative of every other query.
        negative: ``(M, D)`` hard negatives of every query.
        scale: Factor on the cosine similarities, the inverse of the temperature.
        symmetric: Average with the same loss from positive to query, which has no hard negatives.
        ignored: ``(N, N + M)``, candidates that are left out, as `ignored_candidates` finds them.

    Returns:
        A scalar in float32.
    """
    n = len(query)
    query, positive = F.normalize(query.float(), dim=-1), F.normalize(positive.float(), dim=-1)
    candidates = positive if negative is None else torch.cat([positive, F.normalize(negative.float(), dim=-1)])
    logits = scale * query @ candidates.T
    if ignored is not None:
        logits = logits.masked_fill(ignored, -torch.inf)
    labels = torch.arange(n, device=query.device)
    loss = F.cross_entropy(logits, labels)
    if symmetric:
        loss = (loss + F.cross_entropy(logits[:, :n].T, labels)) / 2
    return loss
