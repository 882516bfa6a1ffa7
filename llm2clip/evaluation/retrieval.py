# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A model on a retrieval benchmark."""

from dataclasses import dataclass
from typing import Any, Union

import torch

from llm2clip.evaluation.sets.files import RetrievalSet
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.retrieval import RetrievalRanks, rank_both_ways

__all__ = ['QUERY_LENGTHS', 'RetrievalResult', 'by_query_length', 'evaluate_retrieval']

QUERY_LENGTHS = {'1-2': 2, '3-5': 5, '6-12': 12, '13+': None}
"""Length of a text -> the most words that it has, if there is a limit."""


@dataclass
class RetrievalResult:
    """What a model found."""

    images: list[int]
    """Positions in the set of the N images that have a caption."""
    image_features: torch.Tensor
    """``(N, D)``, of these images."""
    text_features: torch.Tensor
    """``(T, D)``"""
    texts: list[str]
    ranks: RetrievalRanks


def evaluate_retrieval(
    dataset: RetrievalSet,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    merge_equal_texts: bool = False,
    device: Union[str, torch.device] = 'cpu',
) -> RetrievalResult:
    """Rank both ways.  Images without a caption are left out.

    Args:
        dataset: Which texts belong to which image.
        image_features: ``(M, D)``, of all images of the set, by a model.
        text_features: ``(T, D)``, of all texts of the set, by the same model.
        merge_equal_texts: Texts of the same wording are one.
        device: Where the scores are computed.
    """
    images = [i for i, captions in enumerate(dataset.captions) if captions]
    image_features = image_features[images]
    counts = torch.tensor([len(dataset.captions[i]) for i in images])
    image_of_text = torch.arange(len(counts)).repeat_interleave(counts)
    texts, text_id = dataset.texts, None
    if merge_equal_texts:
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        text_id = torch.tensor([numbers[text] for text in texts])
    ranks = rank_both_ways(image_features.to(device), text_features.to(device), image_of_text.to(device),
                           None if text_id is None else text_id.to(device))
    ranks = RetrievalRanks(*(x.cpu() for x in ranks))
    return RetrievalResult(images, image_features, text_features, texts, ranks)


def by_query_length(result: RetrievalResult, resamples: int = 1000) -> dict[str, tuple[dict[str, Any], Outcomes]]:
    """How often texts of each length find their image, among all images of the set.

    Words are what white space separates: a text in Chinese, Japanese or Thai is mostly one.

    Args:
        result: What a model found.
        resamples: Of the bootstrap; 0: no intervals.

    Returns:
        Length, of `QUERY_LENGTHS` that occur -> ``n_texts``, ``image_retrieval_recall@k`` in percent and their 95 %
        ``intervals``; and which texts found one of their images.
    """
    words = [len(result.texts[i].split()) for i in result.ranks.text_index.tolist()]
    outcomes, found, least = result.ranks.outcomes()[0], {}, 0
    for length, most in QUERY_LENGTHS.items():
        positions = [i for i, n in enumerate(words) if least < n and (most is None or n <= most)]
        least = most or 0
        if positions:
            of_length = outcomes._replace(hits=outcomes.hits[positions], group=outcomes.group[positions])
            shares = 100 * of_length.hits.double().mean(0)
            found[length] = {'n_texts': len(positions), **dict(zip(outcomes.names, shares.tolist())),
                             'intervals': of_length.intervals(resamples) if resamples else {}}, of_length
    return found
