# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot classification by prompts, and the linear probe."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit

from llm2clip.config import ConfigError
from llm2clip.data.caption_files import read_lines
from llm2clip.files import FileError
from llm2clip.metrics.bootstrap import Outcomes, bootstrap_interval
from llm2clip.metrics.classification import (
    accuracy_per_class,
    average_precision,
    class_ranks,
    class_scores,
    mean_of_prompts,
)
from llm2clip.metrics.retrieval import recall

__all__ = [
    'check_probe_labels', 'class_features', 'class_prompts', 'linear_probe', 'read_templates', 'zeroshot_metrics',
]

# Inverse strengths of the regularisation that the probe chooses from.
_C = tuple(10.0 ** power for power in range(-2, 5))


def read_templates(path: Union[str, Path], key: str) -> list[str]:
    """The prompts of a text file, with `{}` for the class name, where the file may have `{c}`.

    Raises:
        ConfigError: There is no file, it is empty, or a line has neither.
    """
    try:
        templates = [line.replace('{c}', '{}') for _, line in read_lines(str(path)) if not line.startswith('#')]
    except FileError as error:
        raise ConfigError(f'{key}: {error}') from None
    wrong = [line for line in templates if '{}' not in line]
    if wrong or not templates:
        raise ConfigError(f'{key}: {path}: expected a prompt with {{}} for the class name on each line, got '
                          f'{wrong[0]!r}' if wrong else f'{key}: {path} has no prompt')
    return templates


def class_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of each name, name by name; those of classes with the same name once."""
    return [template.replace('{}', name) for name in dict.fromkeys(classes) for template in templates]


def class_features(prompt_features: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """``(C, D)``: the mean of each class's prompts, normalised.

    Args:
        prompt_features: ``(names x prompts, D)`` of length 1, of `class_prompts`.
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
        return _accuracy(class_ranks(image_features, class_features, labels), labels, classes, 'zeroshot', resamples)
    precision = 100 * average_precision(class_scores(image_features, class_features), labels)
    return {'n_images': len(labels), 'n_classes': len(classes), 'mean_average_precision': precision.mean().item(),
            'per_class': dict(zip(_distinct(classes), precision.tolist()))}, []


def _distinct(classes: Sequence[str]) -> list[str]:
    """Names of classes; those that are the same with the position of the class."""
    counts = Counter(classes)
    return [name if counts[name] == 1 else f'{name} ({position})' for position, name in enumerate(classes)]


def _accuracy(
    ranks: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], name: str, resamples: int
) -> tuple[dict[str, Any], list[Outcomes]]:
    ks = [k for k in (1, 5) if k <= len(classes)]
    images = torch.arange(len(ranks))
    hits = torch.stack([ranks < k for k in ks], 1)
    outcomes = Outcomes(tuple(f'{name}_top{k}' for k in ks), hits, images)
    intervals = {}
    if resamples:
        low_high = (100 * bootstrap_interval(hits, images, resamples)).tolist()
        intervals = {metric: tuple(pair) for metric, pair in zip(outcomes.names, low_high)}
    names = _distinct(classes)
    per_class = {names[c]: accuracy for c, accuracy in accuracy_per_class(ranks, labels).items()}
    values = {'n_images': len(labels), 'n_classes': len(classes), **{f'{name}_top{k}': recall(ranks, k) for k in ks},
              'mean_per_class': sum(per_class.values()) / len(per_class), 'intervals': intervals,
              'per_class': per_class}
    return values, [outcomes, Outcomes(('mean_per_class',), hits[:, :1], images, labels)]


def check_probe_labels(train_labels: Sequence[int], test_labels: Sequence[int], classes: Sequence[str]) -> None:
    """Raise a ValueError if a class has a single training image, or a test class none."""
    counts = Counter(train_labels)
    for c in sorted({*train_labels, *test_labels}):
        if counts[c] < 2:
            raise ValueError(f'class {classes[c]!r} has {counts[c]} training images, expected at least 2')


def linear_probe(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor,
    classes: Sequence[str], resamples: int = 1000, seed: int = 0,
) -> tuple[dict[str, Any], list[Outcomes]]:
    """Logistic regression on frozen features, as `zeroshot_metrics` reports, with the chosen `C`.

    Features are scaled to length 1.  The regularisation is that which does best on a fifth of the training set, with
    each class's share; the final fit sees all of it.

    Args:
        train: ``(N, W)``.
        train_labels: ``(N,)``, every class at least twice.
        test: ``(M, W)``.
        test_labels: ``(M,)``.
        classes: C names.
        resamples: Of the bootstrap.
        seed: Of the split.

    Raises:
        ValueError: A class has a single training image, or a test class none.
    """
    check_probe_labels(train_labels.tolist(), test_labels.tolist(), classes)
    x, y = F.normalize(train, dim=-1).numpy(), train_labels.numpy()
    held = max(len(np.unique(y)), len(y) // 5)
    split = StratifiedShuffleSplit(1, test_size=held, random_state=seed)
    probe = GridSearchCV(LogisticRegression(max_iter=1000), {'C': _C}, cv=split).fit(x, y)
    logits = torch.full((len(test), len(classes)), -torch.inf, dtype=torch.float64)
    logits[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(
        probe.predict_log_proba(F.normalize(test, dim=-1).numpy())).double()
    right = logits.gather(1, test_labels[:, None])
    ranks = (logits >= right).sum(1) - 1
    values, outcomes = _accuracy(ranks, test_labels, classes, 'linear_probe', resamples)
    return {**values, **probe.best_params_}, outcomes
