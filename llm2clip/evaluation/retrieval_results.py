# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval benchmarks: ranks in both directions, and a gallery of queries with their results."""

import base64
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

import torch

from llm2clip.data.images import decode_image, encode_image
from llm2clip.evaluation.retrieval_sets import RetrievalSet
from llm2clip.metrics.retrieval import RetrievalRanks, rank_both_ways

# Longer side of a thumbnail in pixels: about twice its size on the page, for high-density screens.
_SIDE = 112


@dataclass
class RetrievalResult:
    """Features and ranks of a model on a retrieval set."""

    images: list[int]
    """Positions in the set of the N images that have a caption."""
    image_features: torch.Tensor
    """``(N, D)``, of these images."""
    text_features: torch.Tensor
    """``(T, D)``"""
    ranks: RetrievalRanks


def evaluate_retrieval(
    dataset: RetrievalSet, image_features: torch.Tensor, text_features: torch.Tensor,
    merge_equal_texts: bool = False, device: Union[str, torch.device] = 'cpu',
) -> RetrievalResult:
    """Rank images for each text and texts for each image.  Images without a caption are left out.

    Args:
        dataset: Images and their captions.
        image_features: ``(M, D)``, of all images of the set.
        text_features: ``(T, D)``, of all texts of the set, from the same model.
        merge_equal_texts: Count texts with the same wording as one.
        device: Device that computes the scores.
    """
    images = [i for i, captions in enumerate(dataset.captions) if captions]
    image_features = image_features[images]
    counts = torch.tensor([len(dataset.captions[i]) for i in images])
    image_of_text = torch.arange(len(counts)).repeat_interleave(counts)
    text_id = None
    if merge_equal_texts:
        numbers = {text: i for i, text in enumerate(dict.fromkeys(dataset.texts))}
        text_id = torch.tensor([numbers[text] for text in dataset.texts], device=device)
    ranks = rank_both_ways(image_features.to(device), text_features.to(device), image_of_text.to(device),
                           text_id)
    ranks = RetrievalRanks(*(x.cpu() for x in ranks))
    return RetrievalResult(images, image_features, text_features, ranks)


def make_gallery(dataset: RetrievalSet, result: RetrievalResult, n: int, top: int = 6) -> dict[str, Any]:
    """Return the best, median and worst queries of a benchmark, for the report.

    Args:
        dataset: Retrieval set with the images to show.
        result: Features and ranks of a model on the set.
        n: Queries per kind and direction.
        top: Results per query.

    Returns:
        ``texts`` and ``images``: lists of ``kind``, ``rank`` (1 is the best), ``query`` and ``results``.  A
        result is a picture (data URI) or text, and whether it is right.  If none is right, the best right one
        is appended.
    """
    index, right = result.ranks.text_index, result.ranks.right
    all_texts = dataset.texts
    texts = [all_texts[i] for i in index.tolist()]
    text_features = result.text_features[index]
    images_of: dict[int, set[int]] = {}
    texts_of: dict[int, set[int]] = {}
    for text, image in right.tolist():
        images_of.setdefault(text, set()).add(image)
        texts_of.setdefault(image, set()).add(text)

    @functools.cache
    def shown(i: int) -> str:
        position = result.images[i]
        return thumbnail(dataset.read_image(position), dataset.image_ids[position])

    gallery: dict[str, Any] = {'texts': [], 'images': []}
    for row in _gallery_rows(text_features, result.image_features, result.ranks.texts, images_of, n, top):
        results = [(shown(i), is_right) for i, is_right in row.results]
        gallery['texts'].append(row._asdict() | {'query': texts[row.query], 'results': results})
    for row in _gallery_rows(result.image_features, text_features, result.ranks.images, texts_of, n, top):
        results = [(texts[i], is_right) for i, is_right in row.results]
        gallery['images'].append(row._asdict() | {'query': shown(row.query), 'results': results})
    return gallery


def thumbnail(data: bytes, name: str) -> str:
    """Return a small JPEG of an encoded image as a data URI."""
    image = decode_image(data, name)
    image.thumbnail((_SIDE, _SIDE))
    return f'data:image/jpeg;base64,{base64.b64encode(encode_image(image, "JPEG", quality=85)).decode()}'


class _Row(NamedTuple):
    """Query of a gallery."""

    kind: str
    rank: int
    query: int
    """Position of the query."""
    results: list[tuple[int, bool]]
    """Position of each candidate shown, and whether it is right."""


def _gallery_rows(
    queries: torch.Tensor, candidates: torch.Tensor, ranks: torch.Tensor, right: dict[int, set[int]],
    n: int, top: int,
) -> list[_Row]:
    """Best, median and worst queries by rank and, for equal ranks, the score of the first right candidate."""
    first = torch.tensor([min(right[i]) for i in range(len(queries))])
    margins = (queries * candidates[first]).sum(-1)
    order = sorted(range(len(ranks)), key=lambda i: (int(ranks[i]), -float(margins[i])))
    n = min(n, len(order) // 3)
    middle = (len(order) - n) // 2
    rows = []
    for kind, start in (('best', 0), ('median', middle), ('worst', len(order) - n)):
        for query in order[start:start + n]:
            scores = candidates @ queries[query]
            best = scores.topk(min(top, len(candidates))).indices.tolist()
            if right[query].isdisjoint(best):
                best.append(max(right[query], key=scores.tolist().__getitem__))
            rows.append(_Row(kind, int(ranks[query]) + 1, query, [(i, i in right[query]) for i in best]))
    return rows
