# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval metrics between two sets of vectors: pure functions and torchmetrics."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llm2clip.device import in_float32
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.ranks import dist

# Maximum number of scores in memory, and of queries at once on a CPU, whose cache holds few scores.
_SCORES = 2**27
_CPU_QUERIES = 384
_KS = (1, 5, 10)


@in_float32
def retrieval_ranks(
    queries: torch.Tensor, candidates: torch.Tensor, right: torch.Tensor, chunk: Optional[int] = None
) -> torch.Tensor:
    """Return the number of wrong candidates that score at least as high as the best right one, ``(Q,)``.

    Ties and NaN scores count against the query, so that a model with constant scores finds nothing.

    Args:
        queries: ``(Q, D)``.
        candidates: ``(C, D)``.
        right: ``(P, 2)`` distinct pairs (query, candidate); every query occurs in at least one.
        chunk: Queries scored at once, with ``chunk * C`` float32 scores in memory.  None: half a gigabyte of
            scores, or fewer on a CPU.
    """
    if chunk is None:
        chunk = max(1, _SCORES // len(candidates))
        if candidates.device.type == 'cpu':
            chunk = min(chunk, _CPU_QUERIES)
    right = right[right[:, 0].argsort()]
    counts = torch.bincount(right[:, 0], minlength=len(queries))
    assert counts.all(), 'a query has no right candidate'
    ends = counts.cumsum(0)
    candidates = candidates.float()
    # One buffer for all chunks: the system takes long to give memory.
    buffer = torch.empty(min(chunk, len(queries)), len(candidates), device=candidates.device)
    ranks = []
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        rows, columns = right[int(ends[start] - counts[start]):int(ends[stop - 1])].T
        rows = rows - start
        scores = torch.matmul(queries[start:stop].float(), candidates.T, out=buffer[:stop - start])
        right_scores = scores[rows, columns]
        best = torch.full((stop - start,), -torch.inf, device=scores.device)
        best = best.scatter_reduce(0, rows, right_scores, 'amax')
        # In place and in float32, which counts exactly up to 2**24: a sum of booleans would need eight bytes
        # for each.
        at_least = len(candidates) - scores.lt_(best[:, None]).sum(1).long()
        ranks.append(at_least - torch.bincount(rows[~(right_scores < best[rows])], minlength=stop - start))
    return torch.cat(ranks)


def recall(ranks: torch.Tensor, k: int) -> float:
    """Return the percentage of queries with a right candidate among the first `k`, from `ranks` ``(Q,)``."""
    return 100 * (ranks < k).float().mean().item()


def chance(n_right: torch.Tensor, n_candidates: int, k: int) -> float:
    """Return the expected recall@k of a random ranking in percent.

    `n_right` ``(Q,)`` is the number of right candidates of each query.
    """
    n_right = n_right.double().cpu()
    miss = torch.ones_like(n_right)
    for drawn in range(min(k, n_candidates)):
        miss *= (n_candidates - n_right - drawn).clamp(min=0) / (n_candidates - drawn)
    return 100 * (1 - miss.mean().item())


class RetrievalRanks(NamedTuple):
    """Ranks in both directions for N images and T different texts."""

    texts: torch.Tensor
    """``(T,)`` `retrieval_ranks` with texts as queries and images as candidates."""
    images: torch.Tensor
    """``(N,)`` `retrieval_ranks` with images as queries and texts as candidates."""
    text_index: torch.Tensor
    """``(T,)`` row of each text in the features given to `rank_both_ways`."""
    right: torch.Tensor
    """``(P, 2)`` pairs (text, image) that belong together."""

    def recalls(self) -> dict[str, float]:
        """Return counts, recalls in percent for k of 1, 5 and 10, and mean ranks (1 is the best).  Recalls
        are ``image_retrieval_recall@k`` (text -> image), ``text_retrieval_recall@k`` (image -> text) and
        ``chance@10``, the text -> image recall of a random ranking."""
        result: dict[str, float] = {'n_images': len(self.images), 'n_texts': len(self.texts)}
        for k in _KS:
            result[f'image_retrieval_recall@{k}'] = recall(self.texts, k)
            result[f'text_retrieval_recall@{k}'] = recall(self.images, k)
        result['image_retrieval_mean_rank'] = 1 + self.texts.double().mean().item()
        result['text_retrieval_mean_rank'] = 1 + self.images.double().mean().item()
        result['chance@10'] = chance(torch.bincount(self.right[:, 0]), len(self.images), 10)
        return result

    def outcomes(self, positions: Sequence[int], n_images: int) -> list[Outcomes]:
        """Return whether each text finds one of its images among the first k, then the same for images.

        Queries are grouped by image, a text by its first one, and groups are numbered by the position of the
        image in its set, so that sets with the same images are resampled alike.

        Args:
            positions: Positions of the N images in the set.
            n_images: Number of images of the set.
        """
        image_of_text = torch.full((len(self.texts),), len(self.images)).scatter_reduce(
            0, self.right[:, 0].cpu(), self.right[:, 1].cpu(), 'amin')
        image_position = torch.tensor(positions)
        text_position = image_position[image_of_text]
        outcomes = []
        directions = (('image', self.texts, text_position), ('text', self.images, image_position))
        for target, ranks, group in directions:
            names = tuple(f'{target}_retrieval_recall@{k}' for k in _KS)
            hits = torch.stack([ranks.cpu() < k for k in _KS], dim=1)
            outcomes.append(Outcomes(names, hits, group, n_images))
        return outcomes


def rank_both_ways(
    image_features: torch.Tensor, text_features: torch.Tensor, image_of_text: torch.Tensor,
    text_id: Optional[torch.Tensor] = None,
) -> RetrievalRanks:
    """Rank images for each text, and texts for each image, for which any of its texts is right.

    CLIP_benchmark defines it in the same way.

    Args:
        image_features: ``(N, D)``.
        text_features: ``(T, D)``.
        image_of_text: ``(T,)``, position of the image that a text belongs to.
        text_id: ``(T,)``; texts with the same id count as one, which belongs to all their images.  None: all
            differ.
    """
    index = torch.arange(len(text_features), device=image_of_text.device)
    text = index
    if text_id is not None:
        ids, text = torch.unique(text_id, return_inverse=True)
        index = torch.full((len(ids),), len(text), device=text.device).scatter_reduce(0, text, index, 'amin')
    texts = text_features[index]
    right = torch.unique(torch.stack([text, image_of_text], 1), dim=0)
    return RetrievalRanks(retrieval_ranks(texts, image_features, right),
                          retrieval_ranks(image_features, texts, right.flip(1)), index, right)


def caption_retrieval_accuracy(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return caption retrieval accuracy (CRA) in percent.

    It is the share of captions that are nearest to the other caption of their image, as the mean over both
    directions.  Row i of `first` and of `second`, both ``(N, D)``, describe the same
    image.
    """
    first = torch.nn.functional.normalize(first.float(), dim=-1)
    second = torch.nn.functional.normalize(second.float(), dim=-1)
    right = torch.arange(len(first), device=first.device)[:, None].expand(-1, 2)
    first_ranks = retrieval_ranks(first, second, right)
    second_ranks = retrieval_ranks(second, first, right)
    return (recall(first_ranks, 1) + recall(second_ranks, 1)) / 2


def _has_other_ranks() -> bool:
    return dist.get_world_size() > 1


class Collected(Metric):
    """Rows gathered over batches and ranks; samples repeated as padding count once."""

    full_state_update = False
    names: tuple[str, ...] = ()
    index: list[torch.Tensor]

    def __init__(self) -> None:
        # With gloo, a single rank would gather from itself in a thread that has OpenMP threads of its own.
        # libgomp then counts more threads than cores and lets all of them sleep between operations: a step on
        # two cores took 1.6 s before the first evaluation and 2.8 s after it.
        super().__init__(distributed_available_fn=_has_other_ranks)
        for name in (*self.names, 'index'):
            self.add_state(name, default=[], dist_reduce_fx='cat')

    def append(self, index: torch.Tensor, *rows: torch.Tensor) -> None:
        """Add a batch: sample positions `index` ``(B,)``, and a tensor ``(B, …)`` for each of `names`."""
        for name, value in zip(('index', *self.names), (index, *rows)):
            getattr(self, name).append(value.detach())

    def rows(self) -> list[torch.Tensor]:
        """Return the gathered tensor for each of `names`, with samples sorted by position."""
        index = dim_zero_cat(self.index)
        order = index.argsort(stable=True)
        ordered = index[order]
        keep = order[torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])]
        return [dim_zero_cat(getattr(self, name))[keep] for name in self.names]


class CaptionRetrievalAccuracy(Collected):
    """`caption_retrieval_accuracy` over an evaluation set."""

    names = ('first', 'second', 'both')

    def update(
        self, first: torch.Tensor, second: torch.Tensor, index: torch.Tensor, both: torch.Tensor
    ) -> None:
        """Add a batch of captions ``(B, D)``; samples without `both` ``(B,)`` do not count."""
        self.append(index, first, second, both.to(index))

    def compute(self) -> torch.Tensor:
        first, second, both = self.rows()
        if not both.any():
            raise ValueError('caption retrieval accuracy: no sample has both captions')
        return torch.tensor(caption_retrieval_accuracy(first[both > 0], second[both > 0]))


class RetrievalRecall(Collected):
    """Mean recall@k of both directions over an evaluation set, in percent, from `rank_both_ways`.

    Images are ``(B, D)``, texts ``(B, K, D)``, ids ``(B, K)``; id 0 is padding.  Images without texts are
    skipped.
    """

    names = ('image_features', 'text_features', 'text_id')

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        self.k = k

    def update(
        self, image_features: torch.Tensor, text_features: torch.Tensor, index: torch.Tensor,
        text_id: torch.Tensor,
    ) -> None:
        self.append(index, image_features, text_features, text_id)

    def compute(self) -> torch.Tensor:
        images, texts, text_id = self.rows()
        is_text = text_id != 0
        has_text = is_text.any(1)
        if not has_text.any():
            raise ValueError('retrieval recall: no image has a caption')
        # Images that have a text, numbered from 0.
        image_of_text = (has_text.cumsum(0) - 1)[:, None].expand_as(is_text)
        ranks = rank_both_ways(images[has_text], texts[is_text], image_of_text[is_text], text_id[is_text])
        return torch.tensor((recall(ranks.texts, self.k) + recall(ranks.images, self.k)) / 2)
