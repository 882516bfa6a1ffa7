# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Classification metrics: pure functions, which agree with CLIP_benchmark, and torchmetrics."""

import torch
import torch.nn.functional as F

from llm2clip.device import in_float32
from llm2clip.metrics.retrieval import Collected, recall

# Maximum number of scores in memory.
_SCORES = 2**27


def mean_of_prompts(prompt_features: torch.Tensor) -> torch.Tensor:
    """Return the normalised means ``(N, D)`` of unit vectors ``(N, P, D)``, P prompts for each of N names."""
    return F.normalize(prompt_features.mean(dim=1), dim=-1)


@in_float32
def class_scores(image_features: torch.Tensor, class_features: torch.Tensor) -> torch.Tensor:
    """Return the dot products ``(N, C)`` of ``(N, D)`` and ``(C, D)``; equal classes get identical scores."""
    # A matrix product may round equal columns differently, so it only sees distinct ones.
    distinct, which = class_features.float().unique(dim=0, return_inverse=True)
    return (image_features.float() @ distinct.T)[:, which]


def class_ranks(
    image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the number of classes that rank before the right one for each image, ``(N,)``.

    Classes with equal scores rank in their order, as in ``argmax``; ImageNet has two classes named missile.
    NaN scores rank before the right class.

    Args:
        image_features: ``(N, D)``.
        class_features: ``(C, D)``.
        labels: ``(N,)``, position of the right class of each image.
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
    """Return class -> percentage of its images with rank 0, for the classes that have images."""
    return {c: recall(ranks[labels == c], 1) for c in labels.unique().tolist()}


def average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the average precision of each class, ``(C,)``, from 0 to 1.

    Images are ranked by `scores` ``(N, C)``.  Images with equal scores share the last of their ranks, as in
    scikit-learn.  `targets` ``(N, C)`` are 1 where an image has the class.  A class without images gets 0.
    """
    ascending, order = scores.sort(dim=0)
    right = targets.gather(0, order).float()
    # Position of the first image, in ascending order, with the same score: it and all after it rank at least
    # as high.
    first = torch.searchsorted(ascending.T.contiguous(), ascending.T.contiguous()).T
    right_from = right.flip(0).cumsum(0).flip(0).gather(0, first)
    precision = right_from / (len(scores) - first)
    return (precision * right).sum(0) / right.sum(0).clamp(min=1)


class _Ranks(Collected):
    """`class_ranks` over an evaluation set."""

    names = ('ranks', 'labels')

    def update(
        self, image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor,
        index: torch.Tensor,
    ) -> None:
        """Add B images with their class positions `labels` ``(B,)`` and sample positions `index` ``(B,)``."""
        self.append(index, class_ranks(image_features, class_features, labels), labels)


class ZeroshotTop1(_Ranks):
    """Percentage of images nearest to their class."""

    def compute(self) -> torch.Tensor:
        ranks, _ = self.rows()
        return torch.tensor(recall(ranks, 1))


class MeanPerClass(_Ranks):
    """Mean of `accuracy_per_class`, in percent."""

    def compute(self) -> torch.Tensor:
        accuracies = accuracy_per_class(*self.rows()).values()
        return torch.tensor(sum(accuracies) / len(accuracies))


class MeanAveragePrecision(Collected):
    """Mean of `average_precision` over the classes of an evaluation set, in percent."""

    names = ('scores', 'labels')

    def update(
        self, image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor,
        index: torch.Tensor,
    ) -> None:
        """Add B images with ones and zeros `labels` ``(B, C)`` and sample positions `index` ``(B,)``."""
        self.append(index, class_scores(image_features, class_features), labels)

    def compute(self) -> torch.Tensor:
        return 100 * average_precision(*self.rows()).mean()
