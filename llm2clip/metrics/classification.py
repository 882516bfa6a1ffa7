# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How well classes are told apart by their features: pure functions, which give what CLIP_benchmark gives, and
torchmetrics."""

import torch
import torch.nn.functional as F

from llm2clip.device import in_float32
from llm2clip.metrics.retrieval import Collected, recall

__all__ = [
    'MeanAveragePrecision', 'MeanPerClass', 'ZeroshotTop1', 'accuracy_per_class', 'average_precision', 'class_ranks',
    'class_scores', 'mean_of_prompts',
]

# Held at once.
_SCORES = 2**27


def mean_of_prompts(prompt_features: torch.Tensor) -> torch.Tensor:
    """``(N, P, D)`` features of length 1 of the P prompts of N names -> ``(N, D)``: their means, of length 1."""
    return F.normalize(prompt_features.mean(dim=1), dim=-1)


@in_float32
def class_scores(image_features: torch.Tensor, class_features: torch.Tensor) -> torch.Tensor:
    """``(N, D)`` and ``(C, D)`` -> ``(N, C)`` products; classes of the same features have the same, to the last bit."""
    # A matrix product may round columns that are the same in different ways.
    distinct, which = class_features.float().unique(dim=0, return_inverse=True)
    return (image_features.float() @ distinct.T)[:, which]


def class_ranks(image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``(N,)``: how many of C classes ``(C, D)`` come before the right one, in `labels`, of N images ``(N, D)``.

    Of classes that score the same, the first comes first, as in ``argmax``: ImageNet has two that are called missile.
    A score that is no number comes before the right one.
    """
    classes = torch.arange(len(class_features), device=labels.device)
    size = max(1, _SCORES // len(class_features))
    ranks = []
    for images, right in zip(image_features.split(size), labels[:, None].split(size)):
        scores = class_scores(images, class_features)
        right_scores = scores.gather(1, right)
        ranks.append((~(scores.lt(right_scores) | scores.eq(right_scores) & classes.ge(right))).sum(1))
    return torch.cat(ranks)


def accuracy_per_class(ranks: torch.Tensor, labels: torch.Tensor) -> dict[int, float]:
    """Class -> how many of its images have rank 0, in percent; of the classes that have images."""
    return {c: recall(ranks[labels == c], 1) for c in labels.unique().tolist()}


def average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``(C,)``: of each class, the mean over its images of the precision down to them, the images sorted by `scores`
    ``(N, C)``.  That of a class without images is 0.  `targets` ``(N, C)`` are 1 where an image has the class."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    right = targets.gather(0, order).float()
    precision = right.cumsum(0) / torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    return (precision * right).sum(0) / right.sum(0).clamp(min=1)


class _Ranks(Collected):
    """`class_ranks` over an evaluation set."""

    names = ('ranks', 'labels')

    def update(
        self, image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor, index: torch.Tensor
    ) -> None:
        """Add B images; `labels` ``(B,)``, `index` ``(B,)`` says which images they are."""
        self.append(index, class_ranks(image_features, class_features, labels), labels)


class ZeroshotTop1(_Ranks):
    """How many images are nearest to their class, in percent."""

    def compute(self) -> torch.Tensor:
        ranks, _ = self.rows()
        return torch.tensor(recall(ranks, 1))


class MeanPerClass(_Ranks):
    """Mean of `accuracy_per_class`."""

    def compute(self) -> torch.Tensor:
        accuracies = accuracy_per_class(*self.rows()).values()
        return torch.tensor(sum(accuracies) / len(accuracies))


class MeanAveragePrecision(Collected):
    """Mean of `average_precision` over the classes of an evaluation set, in percent."""

    names = ('scores', 'labels')

    def update(
        self, image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor, index: torch.Tensor
    ) -> None:
        """Add B images; `labels` ``(B, C)`` of ones and zeros, `index` ``(B,)`` says which images they are."""
        self.append(index, class_scores(image_features, class_features), labels)

    def compute(self) -> torch.Tensor:
        return 100 * average_precision(*self.rows()).mean()
