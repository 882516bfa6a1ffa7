# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval benchmarks: ranks in both directions, and a gallery of queries with their results."""

import base64
import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

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
    all_texts = dataset.texts
    texts = [all_texts[i] for i in result.ranks.text_index.tolist()]
    text_features = result.text_features[result.ranks.text_index]
    images_of: dict[int, set[int]] = defaultdict(set)
    texts_of: dict[int, set[int]] = defaultdict(set)
    for text, image in result.ranks.right.tolist():
        images_of[text].add(image)
        texts_of[image].add(text)

    @functools.cache
    def shown(i: int) -> str:
        position = result.images[i]
        return thumbnail(dataset.read_image(position), dataset.image_ids[position])

    images = result.image_features
    wording = texts.__getitem__
    return {
        'texts': _rows(text_features, images, result.ranks.texts, images_of, n, top, wording, shown),
        'images': _rows(images, text_features, result.ranks.images, texts_of, n, top, shown, wording),
    }


def thumbnail(data: bytes, name: str) -> str:
    """Return a small JPEG of an encoded image as a data URI."""
    image = decode_image(data, name)
    image.thumbnail((_SIDE, _SIDE))
    return f'data:image/jpeg;base64,{base64.b64encode(encode_image(image, "JPEG", quality=85)).decode()}'


def _rows(
    queries: torch.Tensor, candidates: torch.Tensor, ranks: torch.Tensor, right: dict[int, set[int]],
    n: int, top: int, show_query: Callable[[int], str], show_candidate: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Best, median and worst queries by rank and, for equal ranks, the score of the first right candidate.

    `show_query` and `show_candidate` map a position to a picture or a text.
    """
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
            results = [(show_candidate(i), i in right[query]) for i in best]
            rows.append({'kind': kind, 'rank': int(ranks[query]) + 1, 'query': show_query(query),
                         'results': results})
    return rows
