# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot classification by prompts, and the numbers of every classification."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.classification import (
    accuracy_per_class,
    average_precision,
    class_ranks,
    class_scores,
    mean_of_prompts,
)
from llm2clip.metrics.retrieval import recall

__all__ = ['accuracy_metrics', 'class_features', 'zeroshot_metrics']


def class_features(prompt_features: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """``(C, D)``: the mean of each class's prompts, normalised.

    Args:
        prompt_features: ``(names x prompts, D)`` of length 1, of `ZeroshotSet.prompts`.
        classes: C names.
    """
    names = {name: position for position, name in enumerate(dict.fromkeys(classes))}
    of_names = mean_of_prompts(prompt_features.view(len(names), -1, prompt_features.shape[-1]))
    return of_names[[names[name] for name in classes]]


def zeroshot_metrics(
    image_features: torch.Tensor, labels: torch.Tensor, class_features: torch.Tensor, classes: Sequence[str],
    resamples: int = 1000,
) -> tuple[dict[str, Any], list[Outcomes]]:
    """What CLIP_benchmark reports, in percent, and more; and which images were right, where they have one class.

    Where an image has one class: `zeroshot_top1`, `zeroshot_top5` if there are five classes, the accuracy `per_class`
    and `mean_per_class` over the classes that have images, and 95 % intervals.  Of classes that score the same, the
    first counts as the nearest.  Where an image has any number of classes: the average precision `per_class`, and
    `mean_average_precision`.

    Args:
        image_features: ``(N, D)``.
        labels: ``(N,)``, or ``(N, C)`` of ones and zeros.
        class_features: ``(C, D)``.
        classes: C names.
        resamples: Of the bootstrap; 0: no intervals.
    """
    if labels.ndim == 1:
        ranks = class_ranks(image_features, class_features, labels)
        return accuracy_metrics(ranks, labels, classes, 'zeroshot', resamples)
    precision = 100 * average_precision(class_scores(image_features, class_features), labels)
    return {'n_images': len(labels), 'n_classes': len(classes), 'mean_average_precision': precision.mean().item(),
            'per_class': dict(zip(_distinct(classes), precision.tolist()))}, []


def _distinct(classes: Sequence[str]) -> list[str]:
    """Names of classes; those that are the same with the position of the class."""
    counts = Counter(classes)
    return [name if counts[name] == 1 else f'{name} ({position})' for position, name in enumerate(classes)]


def accuracy_metrics(
    ranks: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], name: str, resamples: int
) -> tuple[dict[str, Any], list[Outcomes]]:
    """What `zeroshot_metrics` returns where images have one class.

    Args:
        ranks: ``(N,)``, how many classes come before the right one of each image.
        labels: ``(N,)``, the right classes.
        classes: C names.
        name: Which metrics begin with.
        resamples: Of the bootstrap; 0: no intervals.
    """
    ks = [k for k in (1, 5) if k <= len(classes)]
    images = torch.arange(len(ranks))
    hits = torch.stack([ranks < k for k in ks], 1)
    outcomes = Outcomes(tuple(f'{name}_top{k}' for k in ks), hits, images)
    intervals = outcomes.intervals(resamples) if resamples else {}
    names = _distinct(classes)
    per_class = {names[c]: accuracy for c, accuracy in accuracy_per_class(ranks, labels).items()}
    values = {'n_images': len(labels), 'n_classes': len(classes), **{f'{name}_top{k}': recall(ranks, k) for k in ks},
              'mean_per_class': sum(per_class.values()) / len(per_class), 'intervals': intervals,
              'per_class': per_class}
    return values, [outcomes, Outcomes(('mean_per_class',), hits[:, :1], images, labels)]
