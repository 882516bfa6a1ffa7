# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Contrastive losses over the global batch: functions of this rank's features, in float32 also under autocast.

A rank computes the rows of the logit matrix that belong to its own samples, against the candidates of all ranks.  What
a loss here returns is this rank's part: the mean over the ranks is the loss of the global batch, and the mean over the
ranks of the parameters' gradients, as DDP and FSDP compute it, is its gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F

from llm2clip.losses.rows import Ignored, all_gather, first_row, partners_of, sigmoid_loss, softmax_loss

__all__ = ['clip_loss', 'ignored_candidates', 'info_nce', 'siglip_loss']


def clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    label_smoothing: float = 0.0,
    text_id: Optional[torch.Tensor] = None,
    block_size: Optional[int] = None,
    matryoshka_dims: Sequence[int] = (),
) -> torch.Tensor:
    """This rank's part of the symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    With K texts per image, an image has to find each of them without the others among the texts of other images, and
    each text its image.

    Args:
        image_features: ``(B, D)``, L2-normalised, of this rank.
        text_features: ``(B, D)`` or ``(B, K, D)``, L2-normalised; row i belongs to image i.
        logit_scale: The factor on the cosine similarities, in log space, ``(1,)``.
        label_smoothing: Share of a label that is spread evenly over all candidates.
        text_id: ``(B,)`` or ``(B, K)``; an image and a text of another image are not each other's negatives if one of
            the image's texts has the same id.
        block_size: Rows of the logit matrix at once.  None: all of this rank's.
        matryoshka_dims: Average over the losses of the first values of the features, so many at a time and scaled to
            length 1 again, as Matryoshka representations are trained (Kusupati et al. 2022, equation 1).  Empty: all
            values.

    Returns:
        The mean over images, their texts and both directions, a scalar in float32.
    """
    texts, per_image = _columns(text_features)
    scale, same_texts = logit_scale.float().exp(), _same_texts(text_id)
    return torch.stack([softmax_loss(
        rows, columns, scale, first_row(image_features), len(texts), label_smoothing, same_texts, block_size, per_image)
        for rows, columns in _prefixes(image_features, texts, matryoshka_dims)]).mean()


def siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    text_id: Optional[torch.Tensor] = None,
    block_size: Optional[int] = None,
    matryoshka_dims: Sequence[int] = (),
) -> torch.Tensor:
    """This rank's part of the pairwise sigmoid loss of SigLIP (Zhai et al. 2023, algorithm 1).

    Args:
        image_features, text_features, logit_scale, text_id, block_size, matryoshka_dims: As for `clip_loss`.
        logit_bias: Added to each logit, ``(1,)``.

    Returns:
        The sum over all pairs of this rank's images divided by B · K, a scalar in float32.
    """
    texts, per_image = _columns(text_features)
    scale, same_texts = logit_scale.float().exp(), _same_texts(text_id)
    return torch.stack([sigmoid_loss(
        rows, columns, scale, logit_bias, first_row(image_features), same_texts, block_size, per_image)
        for rows, columns in _prefixes(image_features, texts, matryoshka_dims)]).mean()


def _prefixes(
    rows: torch.Tensor, columns: torch.Tensor, matryoshka_dims: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both sides' first values, scaled to length 1, for each of `matryoshka_dims`; for none, both sides as they are."""
    assert max(matryoshka_dims, default=0) <= rows.shape[1], f'{matryoshka_dims[-1]} dimensions of {rows.shape[1]}'
    if not matryoshka_dims:
        yield rows, columns
    for dim in matryoshka_dims:
        yield F.normalize(rows[:, :dim].float(), dim=-1), F.normalize(columns[:, :dim], dim=-1)


def _columns(text_features: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The texts of all ranks, ``(N, D)``, and how many an image has."""
    per_image = 1 if text_features.ndim == 2 else text_features.shape[1]
    return all_gather(text_features.float()).flatten(0, -2), per_image


def info_nce(
    query: torch.Tensor,
    positive: torch.Tensor,
    negative: Optional[torch.Tensor] = None,
    scale: Union[float, torch.Tensor] = 50.0,
    symmetric: bool = False,
    ignored: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """This rank's part of the supervised contrastive loss of stage 1 (LLM2CLIP section 3.1).

    Args:
        query: ``(B, D)`` embeddings of this rank.
        positive: ``(B, D)``; row i is the positive of query i and a negative of every other query of all ranks.
        negative: ``(M, D)`` of this rank, hard negatives of every query of all ranks.
        scale: Factor on the cosine similarities, the inverse of the temperature, a number or ``(1,)``.
        symmetric: Average with the same loss from positive to query, which has no hard negatives.
        ignored: Which candidates of this rank's queries are left out, as `ignored_candidates` finds them.

    Returns:
        A scalar in float32.
    """
    positives = all_gather(F.normalize(positive.float(), dim=-1))
    candidates = positives
    if negative is not None:
        candidates = torch.cat([positives, all_gather(F.normalize(negative.float(), dim=-1))])
    if not isinstance(scale, torch.Tensor):
        scale = candidates.new_full((1,), scale)
    return softmax_loss(F.normalize(query.float(), dim=-1), candidates, scale, first_row(query),
                        len(positives) if symmetric else None,
                        ignored=None if ignored is None else lambda start, stop: ignored[start:stop])


def _same_texts(text_id: Optional[torch.Tensor]) -> Optional[Ignored]:
    """By the ids ``(B,)`` or ``(B, K)`` of this rank's samples, which texts of all ranks are left out of its rows."""
    if text_id is None:
        return None
    columns, first, of_rows = all_gather(text_id).flatten(), first_row(text_id), text_id.reshape(len(text_id), -1)

    def same_text(start: int, stop: int) -> torch.Tensor:
        same = torch.zeros(stop - start, len(columns), dtype=torch.bool, device=columns.device)
        for ids in of_rows[start:stop].unbind(1):
            same |= ids[:, None] == columns
        partners_of(same, first + start, of_rows.shape[1]).fill_(False)
        return same

    return same_text


def ignored_candidates(
    query_id: torch.Tensor,
    positive_id: torch.Tensor,
    negative_id: Optional[torch.Tensor] = None,
    equal_texts: bool = True,
) -> torch.Tensor:
    """Which candidates of this rank's queries are no negatives.

    They are hard negatives that a sample does not have and, with `equal_texts`, those whose pair has a text in common
    with the query's pair.

    Args:
        query_id, positive_id: ``(B,)``; equal ids stand for equal texts.
        negative_id: ``(M,)`` of the hard negatives; 0 where there is none.
        equal_texts: Whether equal texts count.

    Returns:
        ``(B, N + M)`` for the N positives and M hard negatives of all ranks, False at a query's own positive.
    """
    q, p = query_id[:, None], positive_id[:, None]
    queries, positives = all_gather(query_id), all_gather(positive_id)
    shared = (q == queries) | (q == positives) | (p == queries) | (p == positives)
    shared.diagonal(first_row(query_id)).fill_(False)
    shared &= equal_texts
    if negative_id is None:
        return shared
    negatives = all_gather(negative_id)
    equal = ((q == negatives) | (p == negatives)) & equal_texts
    return torch.cat([shared, equal | (negatives == 0)], dim=1)
