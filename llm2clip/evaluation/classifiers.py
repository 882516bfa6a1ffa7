# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot classification with prompts, and linear probes on frozen features."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from tqdm import tqdm

from llm2clip.config import SGDProbeConfig
from llm2clip.evaluation.scores import ClassificationScores
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.classification import (
    accuracy_per_class,
    average_precision,
    class_ranks,
    class_scores,
    mean_of_prompts,
)
from llm2clip.metrics.retrieval import recall

# Candidates for the inverse regularisation strength of the logistic regression.
_C = tuple(10.0 ** power for power in range(-2, 5))


def class_features(prompt_features: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """Return the normalised mean of each class's prompts, ``(C, D)``.

    Args:
        prompt_features: ``(names x prompts, D)`` unit vectors of `ZeroshotSet.prompts`.
        classes: C class names; classes with the same name share its prompts.
    """
    names = {name: position for position, name in enumerate(dict.fromkeys(classes))}
    name_features = mean_of_prompts(prompt_features.view(len(names), -1, prompt_features.shape[-1]))
    return name_features[[names[name] for name in classes]]


def zeroshot_metrics(
    image_features: torch.Tensor, labels: torch.Tensor, class_features: torch.Tensor, classes: Sequence[str],
    resamples: int = 1000,
) -> tuple[ClassificationScores, list[Outcomes]]:
    """Return the zero-shot metrics of CLIP_benchmark and more, in percent, and the outcomes per image.

    With one class per image, the metrics are `zeroshot_top1`, `zeroshot_top5` (from five classes on), the
    accuracy `per_class`, `mean_per_class` over the classes that have images, and 95 % intervals.  Among
    classes with equal scores, the first counts as the nearest.  With any number of classes per image, the
    metrics are the average precision `per_class` and `mean_average_precision`, without outcomes.

    Args:
        image_features: ``(N, D)``.
        labels: ``(N,)`` class positions, or ``(N, C)`` ones and zeros.
        class_features: ``(C, D)``.
        classes: C class names.
        resamples: Number of bootstrap resamples; 0 for no intervals.
    """
    if labels.ndim == 1:
        ranks = class_ranks(image_features, class_features, labels)
        return _accuracies(ranks, labels, classes, 'zeroshot', resamples)
    precision = 100 * average_precision(class_scores(image_features, class_features), labels)
    per_class = dict(zip(_distinct(classes), precision.tolist()))
    scores = ClassificationScores(n_images=len(labels), n_classes=len(classes), per_class=per_class,
                                  mean_average_precision=precision.mean().item())
    return scores, []


def _distinct(classes: Sequence[str]) -> list[str]:
    """Class names; the position of the class is appended to duplicates."""
    counts = Counter(classes)
    names = list(classes)
    for position, name in enumerate(classes):
        if counts[name] > 1:
            names[position] = f'{name} ({position})'
    return names


def _accuracies(
    ranks: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], kind: str, resamples: int
) -> tuple[ClassificationScores, list[Outcomes]]:
    """Scores and outcomes from the rank of each image's class ``(N,)``."""
    ks = [k for k in (1, 5) if k <= len(classes)]
    images = torch.arange(len(ranks))
    hits = torch.stack([ranks < k for k in ks], 1)
    top = Outcomes(tuple(f'{kind}_top{k}' for k in ks), hits, images, len(images))
    balanced = Outcomes(('mean_per_class',), hits[:, :1], images, len(images), labels)
    names = _distinct(classes)
    per_class = {names[c]: accuracy for c, accuracy in accuracy_per_class(ranks, labels).items()}
    scores: dict[str, Any] = {f'{kind}_top{k}': recall(ranks, k) for k in ks}
    mean = sum(per_class.values()) / len(per_class)
    scores |= {'n_images': len(labels), 'n_classes': len(classes), 'mean_per_class': mean,
               'intervals': top.intervals(resamples), 'per_class': per_class}
    return ClassificationScores.model_validate(scores), [top, balanced]


def linear_probe(
    train: Iterable[torch.Tensor], train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor,
    classes: Sequence[str], sgd: Optional[SGDProbeConfig] = None, device: Union[str, torch.device] = 'cpu',
    resamples: int = 1000,
) -> tuple[ClassificationScores, list[Outcomes]]:
    """Train a linear classifier on frozen features and return metrics and outcomes as in `zeroshot_metrics`.

    With `sgd`, `sgd_logits` trains it.  Otherwise it is a logistic regression on normalised features.  Its
    inverse regularisation strength `C` is selected on a stratified fifth of the training set,
    or on as many images as there are classes if that is more.  The final fit uses the whole training set.

    Args:
        train: ``(N, W)``, in blocks of rows; `sgd` iterates twice.
        train_labels: ``(N,)``; every class occurs at least twice.
        test: ``(M, W)``.
        test_labels: ``(M,)``, classes of the training set.
        classes: C class names.
        sgd: Settings of stochastic gradient descent, which runs on `device`; None for logistic regression.
        resamples: Number of bootstrap resamples; 0 for no intervals.
    """
    best_params = {}
    if sgd is not None:
        logits = sgd_logits(train, train_labels, test, len(classes), sgd, device)
    else:
        x = F.normalize(torch.cat([*train]), dim=-1).numpy()
        y = train_labels.numpy()
        split = StratifiedShuffleSplit(1, test_size=max(len(np.unique(y)), len(y) // 5), random_state=0)
        probe = GridSearchCV(LogisticRegression(max_iter=1000), {'C': _C}, cv=split).fit(x, y)
        logits = torch.full((len(test), len(classes)), -torch.inf, dtype=torch.float64)
        log_probabilities = probe.predict_log_proba(F.normalize(test, dim=-1).numpy())
        logits[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(log_probabilities).double()
        best_params = probe.best_params_
    # Ties and NaN scores count against the right class.
    ranks = (~(logits < logits.gather(1, test_labels[:, None]))).sum(1) - 1
    scores, outcomes = _accuracies(ranks, test_labels, classes, 'linear_probe', resamples)
    return scores.model_copy(update=best_params), outcomes


def sgd_logits(
    train: Iterable[torch.Tensor], labels: torch.Tensor, test: torch.Tensor, n_classes: int,
    config: SGDProbeConfig, device: Union[str, torch.device] = 'cpu',
) -> torch.Tensor:
    """Train a linear classifier by stochastic gradient descent and return its test logits ``(M, C)``.

    The paper (section 4.2) specifies batch size, learning rate, momentum, epochs and no weight decay, but
    neither feature scaling nor a learning rate schedule.  Here each dimension has mean 0 and variance 1 over
    the training set, so that one learning rate fits every tower.  The learning rate falls to 0 along a
    cosine.  The weights start at 0, and each epoch shuffles the images.

    The standardised features are kept on the device in float16 (2 · N · W bytes); everything else is float32.

    Args:
        train: ``(N, W)``, in blocks of rows; iterated twice.
        labels: ``(N,)`` class positions.
        test: ``(M, W)``.
        n_classes: C.
        config: Training settings.
        device: Device of the training.
    """
    count = 0
    total = squares = torch.zeros(())
    for block in train:
        wide = block.double()
        count += len(wide)
        total = total + wide.sum(0)
        squares = squares + (wide ** 2).sum(0)
    mean = total / count
    deviation = (squares / count - mean ** 2).clamp(min=0).sqrt()
    # Columns that are constant in float32 stay as they are.
    deviation[deviation <= torch.finfo(torch.float32).eps * mean.abs()] = 1
    mean, deviation = mean.float(), deviation.float()
    x = torch.empty(len(labels), len(mean), dtype=torch.float16, device=device)
    start = 0
    for block in train:
        x[start:start + len(block)] = ((block - mean) / deviation).to(device)
        start += len(block)
    labels = labels.to(device)
    head = torch.nn.Linear(len(mean), n_classes, device=device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), config.learning_rate, config.momentum)
    steps = config.epochs * -(-len(labels) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in tqdm(range(config.epochs), 'linear probe', unit=' epochs'):
        order = torch.randperm(len(labels), generator=generator).to(device)
        for rows in order.split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows].float()), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return torch.cat([head(((block - mean) / deviation).to(device)).cpu() for block in test.split(4096)])
