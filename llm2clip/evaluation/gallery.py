# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a model found, to look at: the best, median and worst queries of a benchmark, and the answers of a search."""

import base64
import functools
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from llm2clip.data.images import decode_image, encode_image
from llm2clip.evaluation.page import picture, section, write_page
from llm2clip.evaluation.retrieval import RetrievalResult
from llm2clip.evaluation.sets.files import RetrievalSet

__all__ = ['make_gallery', 'thumbnail', 'write_search_page']

_KINDS = ('best', 'median', 'worst')
# Pixels of the longer side: about twice what a page shows, for dense screens.
_SIDE, _LARGE = 112, 320


def thumbnail(data: bytes, name: str, side: int = _SIDE) -> str:
    """A small JPEG as a data URI."""
    image = decode_image(data, name)
    image.thumbnail((side, side))
    return f'data:image/jpeg;base64,{base64.b64encode(encode_image(image, "JPEG", quality=85)).decode()}'


def _choose(ranks: torch.Tensor, margins: torch.Tensor, n: int) -> list[tuple[str, int]]:
    """Queries from the ends and the middle of the order by rank, then by how clearly the right one won or lost."""
    order = sorted(range(len(ranks)), key=lambda i: (int(ranks[i]), -float(margins[i])))
    n = min(n, len(order) // len(_KINDS))
    middle = (len(order) - n) // 2
    parts = (order[:n], order[middle:middle + n], order[len(order) - n:])
    return [(kind, query) for kind, part in zip(_KINDS, parts) for query in part]


def make_gallery(dataset: RetrievalSet, result: RetrievalResult, n: int, top: int = 6) -> dict[str, Any]:
    """Rows for the report.

    Args:
        dataset: Whose images are shown.
        result: What a model found in it.
        n: Queries of each kind and direction.
        top: Results per query.

    Returns:
        ``texts`` and ``images``: lists of ``kind``, ``rank`` (1 is the best), ``query`` and ``results``, pairs of a
        picture (a data URI) or text and whether it is right; where none of the first is, the best right one is last.
    """
    index, right = result.ranks.text_index, result.ranks.right
    texts = [result.texts[i] for i in index.tolist()]
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

    by_text = _rows(text_features, result.image_features, result.ranks.texts, images_of, n, top)
    by_image = _rows(result.image_features, text_features, result.ranks.images, texts_of, n, top)
    return {
        'texts': [{**row, 'query': texts[row['query']], 'results': [(shown(i), hit) for i, hit in row['results']]}
                  for row in by_text],
        'images': [{**row, 'query': shown(row['query']), 'results': [(texts[i], hit) for i, hit in row['results']]}
                   for row in by_image],
    }


def _rows(
    queries: torch.Tensor, candidates: torch.Tensor, ranks: torch.Tensor, right: dict[int, set[int]], n: int, top: int
) -> list[dict[str, Any]]:
    # The score of a right candidate, as a measure of how clear a result is.
    first = torch.tensor([min(right[i]) for i in range(len(queries))])
    rows = []
    for kind, query in _choose(ranks, (queries * candidates[first]).sum(-1), n):
        scores = candidates @ queries[query]
        best = scores.topk(min(top, len(candidates))).indices.tolist()
        if right[query].isdisjoint(best):
            best.append(max(right[query], key=lambda i: float(scores[i])))  # noqa: B023
        rows.append({'kind': kind, 'rank': int(ranks[query]) + 1, 'query': query,
                     'results': [(i, i in right[query]) for i in best]})
    return rows


def write_search_page(path: str, seen: str, answers: Iterable[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """Write a page with the pictures that a search found, each of which leads to its file.

    Args:
        path: The page.
        seen: What was searched, a sentence below each query.
        answers: Queries, each with paths of images and their scores.
    """
    folder = os.path.dirname(path) or '.'
    write_page(path, 'Search', (
        section(query, seen, f'<div class="tiles">{"".join(_tile(*hit, folder) for hit in hits)}</div>')
        for query, hits in answers))


def _tile(path: str, score: float, folder: str) -> str:
    try:
        image = picture(thumbnail(Path(path).read_bytes(), path, _LARGE))
    except (OSError, ValueError):  # since it was indexed
        image = '<p>gone or damaged</p>'
    link = quote(os.fsencode(os.path.relpath(path, folder)))
    name = html.escape(os.path.basename(path))
    return (f'<figure><a href="{link}" title="{html.escape(path)}">{image}</a>'
            f'<figcaption><b>{score:.3f}</b> {name}</figcaption></figure>')
