# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Contrastive losses over the global batch: pure functions of features."""

from typing import Optional, Union

import torch
import torch.distributed
import torch.distributed.nn
import torch.nn.functional as F

__all__ = ['all_gather', 'clip_loss', 'ignored_candidates', 'info_nce']


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


def clip_loss(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    Args:
        image_features: ``(N, D)``, L2-normalised, of the whole global batch.
        text_features: ``(N, D)``, L2-normalised; row i belongs to image i.
        logit_scale: The factor on the cosine similarities, in log space.

    Returns:
        The mean over both directions, a scalar in float32.
    """
    logits = logit_scale.float().exp() * image_features.float() @ text_features.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


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
