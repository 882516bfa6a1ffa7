# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How well classes are told apart by their features: pure functions, which give what CLIP_benchmark gives."""

import torch

from llm2clip.float32 import in_float32

__all__ = ['average_precision', 'class_ranks', 'class_scores']

# Held at once.
_SCORES = 2**27


@in_float32
def class_scores(image_features: torch.Tensor, class_features: torch.Tensor) -> torch.Tensor:
    """``(N, C)`` products; classes of the same features have the same scores, to the last bit.

    Args:
        image_features: ``(N, D)``.
        class_features: ``(C, D)``.
    """
    # A matrix product may round columns that are the same in different ways.
    distinct, which = class_features.float().unique(dim=0, return_inverse=True)
    return (image_features.float() @ distinct.T)[:, which]


def class_ranks(image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``(N,)``: how many classes come before the right one of each image.

    Of classes that score the same, the first comes first, as in ``argmax``: ImageNet has two that are called missile.

    Args:
        image_features: ``(N, D)``.
        class_features: ``(C, D)``.
        labels: ``(N,)``, the right classes.
    """
    classes = torch.arange(len(class_features))
    size = max(1, _SCORES // len(class_features))
    ranks = []
    for images, right in zip(image_features.split(size), labels[:, None].split(size)):
        scores = class_scores(images, class_features)
        right_scores = scores.gather(1, right)
        ranks.append((scores.gt(right_scores) | scores.eq(right_scores) & classes.lt(right)).sum(1))
    return torch.cat(ranks)


def average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``(C,)``: of each class, the mean over its images of the precision down to them, the images sorted by score.

    That of a class without images is 0.

    Args:
        scores: ``(N, C)``.
        targets: ``(N, C)``, 1 where an image has the class, else 0.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    right = targets.gather(0, order).float()
    precision = right.cumsum(0) / torch.arange(1, len(scores) + 1)[:, None]
    return (precision * right).sum(0) / right.sum(0).clamp(min=1)
