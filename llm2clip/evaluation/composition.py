# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Metrics of composition benchmarks, in which a model has to tell texts with nearly the same words apart."""

from collections.abc import Sequence
from typing import Any

import torch

from llm2clip.evaluation.sets.files import CompositionSet
from llm2clip.metrics.bootstrap import Outcomes

__all__ = ['composition_metrics']

# Examples per block of similarities.
_BLOCK = 4096
# Score and number of images per example -> percent of examples that random features get right.  For the group score,
# the two right similarities must be the highest, which holds for 4 of the 24 orders of the four similarities.
_CHANCE = {('text', 1): 50.0, ('text', 2): 25.0, ('image', 2): 25.0, ('group', 2): 100 / 6}


def similarities(
    image_features: torch.Tensor, text_features: torch.Tensor, examples: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> torch.Tensor:
    """Return the dot products ``(N, I, 2)`` of the I images and two texts in each of N examples.

    Features are ``(M, D)`` and ``(T, D)``; `examples` hold positions.  Equal text features get bit-identical products.
    """
    images, texts = (torch.tensor(positions) for positions in zip(*examples))
    # Not a matrix product, which may round equal columns differently.
    return torch.cat([(image_features[i].float()[:, :, None] * text_features[t].float()[:, None]).sum(-1)
                      for i, t in zip(images.split(_BLOCK), texts.split(_BLOCK))])


def right_examples(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return score -> whether each example is right, ``(N,)``.  A tie counts as wrong.

    ``text``: every image is nearer to its own text than to the other one.  With two images also ``image``: every text
    is nearer to its own image than to the other one, and ``group``: both hold.  `scores` are ``(N, I, 2)`` for I images
    and two texts; text i belongs to image i.
    """
    own = scores.diagonal(dim1=1, dim2=2)
    right = {'text': (own > scores.flip(2).diagonal(dim1=1, dim2=2)).all(1)}
    if scores.shape[1] == 2:
        right['image'] = (own > scores.flip(1).diagonal(dim1=1, dim2=2)).all(1)
        right['group'] = right['text'] & right['image']
    return right


def composition_metrics(
    dataset: CompositionSet, image_features: torch.Tensor, text_features: torch.Tensor, resamples: int = 1000
) -> tuple[dict[str, Any], list[Outcomes]]:
    """Return the metrics of a set in percent, with `chance` level, 95 % intervals and scores `per_part`, and one
    `Outcomes` per metric.

    Args:
        dataset: Examples that assign texts to images.
        image_features: ``(M, D)``, of all images of the set.
        text_features: ``(T, D)``, of all texts of the set.
        resamples: Number of bootstrap resamples; 0 for no intervals.
    """
    right = right_examples(similarities(image_features, text_features, dataset.examples))
    units, n_images = torch.tensor(dataset.units), len(dataset.examples[0].images)

    def share(score: str, examples: Sequence[int]) -> float:
        return right[score].double()[list(examples)].mean().item()

    numbers, intervals, outcomes = {}, {}, []
    for name, number in dataset.numbers.items():
        numbers[name] = 100 * sum(share(number.score, group) for group in number.groups) / len(number.groups)
        examples = torch.tensor([example for group in number.groups for example in group])
        stratum = torch.arange(len(number.groups)).repeat_interleave(torch.tensor([*map(len, number.groups)]))
        # Examples of one unit are not independent, so that they are resampled together.
        outcomes.append(Outcomes((name,), right[number.score].double()[examples, None], units[examples],
                                 stratum=stratum))
        intervals.update(outcomes[-1].intervals(resamples))
    return {'n_images': len(dataset.image_ids), 'n_texts': len(dataset.texts), 'n_examples': len(dataset.examples),
            **numbers, 'chance': {name: _CHANCE[number.score, n_images] for name, number in dataset.numbers.items()},
            'intervals': intervals, 'per_part': {
                name: {'n_examples': len(part), **{score: 100 * share(score, part) for score in right}}
                for name, part in dataset.parts.items()}}, outcomes
