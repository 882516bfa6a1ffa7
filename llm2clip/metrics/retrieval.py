# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Recall@k between two sets of vectors: pure functions of scores and of which pairs are right, and torchmetrics."""

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = [
    'CaptionRetrievalAccuracy', 'RetrievalRecall', 'caption_retrieval_accuracy', 'chance', 'recall',
    'retrieval_ranks', 'retrieval_recall',
]


def retrieval_ranks(
    queries: torch.Tensor, candidates: torch.Tensor, right: torch.Tensor, chunk: int = 1024
) -> torch.Tensor:
    """For each query, how many wrong candidates score at least as high as its best right one.

    A tie counts against the query, so that a model that gives every pair the same score finds nothing.

    Args:
        queries: ``(Q, D)``.
        candidates: ``(C, D)``.
        right: ``(P, 2)`` distinct pairs (query, candidate); every query stands in at least one.
        chunk: Queries scored at once; memory is ``chunk * C``.

    Returns:
        ``(Q,)`` ranks, 0 where the first hit is right.

    Raises:
        ValueError: A query has no right candidate.
    """
    right = right[right[:, 0].argsort()]
    counts = torch.bincount(right[:, 0], minlength=len(queries))
    if (counts == 0).any():
        raise ValueError(f'query {int((counts == 0).nonzero()[0])} has no right candidate')
    ends = counts.cumsum(0)
    ranks = []
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        rows, columns = right[int(ends[start] - counts[start]):int(ends[stop - 1])].T
        rows = rows - start
        scores = queries[start:stop].float() @ candidates.float().T
        right_scores = scores[rows, columns]
        best = torch.full((stop - start,), -torch.inf, device=scores.device)
        best = best.scatter_reduce(0, rows, right_scores, 'amax')
        at_least = (scores >= best[:, None]).sum(1)
        ranks.append(at_least - torch.bincount(rows[right_scores >= best[rows]], minlength=stop - start))
    return torch.cat(ranks)


def recall(ranks: torch.Tensor, k: int) -> float:
    """Share of queries with a right candidate among the first `k`, in percent."""
    return 100 * (ranks < k).float().mean().item()


def chance(n_right: torch.Tensor, n_candidates: int, k: int) -> float:
    """Recall@k of a random ranking, in percent.

    Args:
        n_right: ``(Q,)``, how many candidates are right for each query.
        n_candidates: All candidates.
        k: Cut-off.
    """
    n_right = n_right.double().cpu()
    miss = torch.ones_like(n_right)
    for drawn in range(min(k, n_candidates)):
        miss *= (n_candidates - n_right - drawn).clamp(min=0) / (n_candidates - drawn)
    return 100 * (1 - miss.mean().item())


def retrieval_recall(
    image_features: torch.Tensor, text_features: torch.Tensor, text_id: torch.Tensor, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k in both directions, for images with K texts each.

    Args:
        image_features: ``(N, D)``.
        text_features: ``(N, K, D)``.
        text_id: ``(N, K)``; texts of one id are one text, which belongs to every image that it stands at.
        ks: Cut-offs.

    Returns:
        ``n_images``, ``n_texts``, ``image_retrieval_recall@k`` (text -> image) and ``text_retrieval_recall@k``
        (image -> text) in percent, and ``chance@10``, that of a random ranking, text -> image.
    """
    n_images, n_keys = text_id.shape
    ids, text = torch.unique(text_id.flatten(), return_inverse=True)
    image = torch.arange(n_images, device=text_id.device).repeat_interleave(n_keys)
    first = torch.full((len(ids),), len(text), device=text.device).scatter_reduce(
        0, text, torch.arange(len(text), device=text.device), 'amin')
    texts = text_features.flatten(0, 1)[first]
    right = torch.unique(torch.stack([text, image], 1), dim=0)
    image_ranks = retrieval_ranks(texts, image_features, right)
    text_ranks = retrieval_ranks(image_features, texts, right.flip(1))
    result: dict[str, float] = {'n_images': n_images, 'n_texts': len(ids)}
    for k in ks:
        result[f'image_retrieval_recall@{k}'] = recall(image_ranks, k)
        result[f'text_retrieval_recall@{k}'] = recall(text_ranks, k)
    result['chance@10'] = chance(torch.bincount(right[:, 0]), n_images, 10)
    return result


def caption_retrieval_accuracy(first: torch.Tensor, second: torch.Tensor) -> float:
    """CRA: how often a caption's nearest neighbour is the other caption of its image, both ways, in percent.

    Args:
        first: ``(N, D)`` embeddings.
        second: ``(N, D)``; row i describes the same image as row i of `first`.
    """
    first, second = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (first, second))
    right = torch.arange(len(first), device=first.device)[:, None].expand(-1, 2)
    return (recall(retrieval_ranks(first, second, right), 1) + recall(retrieval_ranks(second, first, right), 1)) / 2


class _Collected(Metric):
    """Rows gathered over batches and ranks; a sample that padding delivered twice counts once."""

    full_state_update = False
    names: tuple[str, ...] = ()
    index: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in (*self.names, 'index'):
            self.add_state(name, default=[], dist_reduce_fx='cat')

    def _append(self, index: torch.Tensor, *rows: torch.Tensor) -> None:
        for name, value in zip(('index', *self.names), (index, *rows)):
            getattr(self, name).append(value.detach())

    def _rows(self) -> list[torch.Tensor]:
        index = dim_zero_cat(self.index)
        order = index.argsort(stable=True)
        ordered = index[order]
        keep = order[torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])]
        return [dim_zero_cat(getattr(self, name))[keep] for name in self.names]


class CaptionRetrievalAccuracy(_Collected):
    """`caption_retrieval_accuracy` over an evaluation set."""

    names = ('first', 'second')

    def update(self, first: torch.Tensor, second: torch.Tensor, index: torch.Tensor) -> None:
        self._append(index, first, second)

    def compute(self) -> torch.Tensor:
        return torch.tensor(caption_retrieval_accuracy(*self._rows()))


class RetrievalRecall(_Collected):
    """Mean of both directions' recall@k over an evaluation set; `retrieval_recall` has the details.

    Args:
        k: Cut-off.
    """

    names = ('image_features', 'text_features', 'text_id')

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        self.k = k

    def update(
        self, image_features: torch.Tensor, text_features: torch.Tensor, index: torch.Tensor, text_id: torch.Tensor
    ) -> None:
        self._append(index, image_features, text_features, text_id)

    def compute(self) -> torch.Tensor:
        result = retrieval_recall(*self._rows(), ks=(self.k,))
        ways = (f'image_retrieval_recall@{self.k}', f'text_retrieval_recall@{self.k}')
        return torch.tensor(sum(result[way] for way in ways) / 2)
