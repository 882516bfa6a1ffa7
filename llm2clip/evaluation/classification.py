# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot classification by prompts, and linear probes: how well frozen features tell classes apart."""

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
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.classification import (
    accuracy_per_class,
    average_precision,
    class_ranks,
    class_scores,
    mean_of_prompts,
)
from llm2clip.metrics.retrieval import recall

__all__ = ['class_features', 'linear_probe', 'zeroshot_metrics']

# Inverse strengths of the regularisation that logistic regression chooses from.
_C = tuple(10.0 ** power for power in range(-2, 5))


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
        return _accuracy_metrics(ranks, labels, classes, 'zeroshot', resamples)
    precision = 100 * average_precision(class_scores(image_features, class_features), labels)
    return {'n_images': len(labels), 'n_classes': len(classes), 'mean_average_precision': precision.mean().item(),
            'per_class': dict(zip(_distinct(classes), precision.tolist()))}, []


def _distinct(classes: Sequence[str]) -> list[str]:
    """Names of classes; those that are the same with the position of the class."""
    counts = Counter(classes)
    return [name if counts[name] == 1 else f'{name} ({position})' for position, name in enumerate(classes)]


def _accuracy_metrics(
    ranks: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], name: str, resamples: int
) -> tuple[dict[str, Any], list[Outcomes]]:
    """As `zeroshot_metrics`, of ``(N,)`` ranks, how many classes come before the right one of each image."""
    ks = [k for k in (1, 5) if k <= len(classes)]
    images = torch.arange(len(ranks))
    hits = torch.stack([ranks < k for k in ks], 1)
    outcomes = Outcomes(tuple(f'{name}_top{k}' for k in ks), hits, images)
    names = _distinct(classes)
    per_class = {names[c]: accuracy for c, accuracy in accuracy_per_class(ranks, labels).items()}
    values = {'n_images': len(labels), 'n_classes': len(classes), **{f'{name}_top{k}': recall(ranks, k) for k in ks},
              'mean_per_class': sum(per_class.values()) / len(per_class), 'intervals': outcomes.intervals(resamples),
              'per_class': per_class}
    return values, [outcomes, Outcomes(('mean_per_class',), hits[:, :1], images, labels)]


def linear_probe(
    train: Iterable[torch.Tensor], train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor,
    classes: Sequence[str], sgd: Optional[SGDProbeConfig] = None, device: Union[str, torch.device] = 'cpu',
    resamples: int = 1000,
) -> tuple[dict[str, Any], list[Outcomes]]:
    """A linear classifier on frozen features, as `zeroshot_metrics` reports.

    It is trained by `sgd_logits`, or else it is a logistic regression, of features that are scaled to length 1.  Its
    regularisation, reported as `C`, is that which does best on a fifth of the training set, with each class's share;
    the final fit sees all of it.

    Args:
        train: ``(N, W)``, in blocks of rows.
        train_labels: ``(N,)``, every class at least twice.
        test: ``(M, W)``.
        test_labels: ``(M,)``, of classes of the training set.
        classes: C names.
        sgd: Of the training by stochastic gradient descent; None, logistic regression.
        device: Where that runs.
        resamples: Of the bootstrap; 0: no intervals.
    """
    chosen = {}
    if sgd is not None:
        logits = sgd_logits(train, train_labels, test, len(classes), sgd, device)
    else:
        x, y = F.normalize(torch.cat([*train]), dim=-1).numpy(), train_labels.numpy()
        split = StratifiedShuffleSplit(1, test_size=max(len(np.unique(y)), len(y) // 5), random_state=0)
        probe = GridSearchCV(LogisticRegression(max_iter=1000), {'C': _C}, cv=split).fit(x, y)
        logits = torch.full((len(test), len(classes)), -torch.inf, dtype=torch.float64)
        logits[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(
            probe.predict_log_proba(F.normalize(test, dim=-1).numpy())).double()
        chosen = probe.best_params_
    # A class that scores the same as the right one comes before it, and so does one whose score is no number.
    ranks = (~(logits < logits.gather(1, test_labels[:, None]))).sum(1) - 1
    values, outcomes = _accuracy_metrics(ranks, test_labels, classes, 'linear_probe', resamples)
    return {**values, **chosen}, outcomes


def sgd_logits(
    train: Iterable[torch.Tensor], labels: torch.Tensor, test: torch.Tensor, n_classes: int, config: SGDProbeConfig,
    device: Union[str, torch.device] = 'cpu',
) -> torch.Tensor:
    """``(M, C)`` logits of a linear classifier that was trained on features by stochastic gradient descent.

    The paper (section 4.2) names batch size, learning rate, momentum, epochs and that no weight decays.  It does not
    say how features are scaled, nor whether the learning rate stays the same.  Here each dimension has mean 0 and
    variance 1 over the training set, which makes one learning rate fit every tower, and the learning rate falls to 0
    along a cosine.  The weights start at 0; each epoch sees all images in another order.

    Features are held on the device in float16, 2 · N · W bytes, once their mean is subtracted; the rest is float32.

    Args:
        train: ``(N, W)``, in blocks of rows; read twice.
        labels: ``(N,)``, the classes of these.
        test: ``(M, W)``.
        n_classes: C.
        config: Of the training.
        device: Where it runs.
    """
    mean, deviation = _moments(train)
    x = torch.empty(len(labels), len(mean), dtype=torch.float16, device=device)
    start = 0
    for block in train:
        x[start:start + len(block)] = ((block - mean) / deviation).to(device)
        start += len(block)
    labels, head = labels.to(device), torch.nn.Linear(len(mean), n_classes, device=device)
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


def _moments(blocks: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(W,)`` mean and standard deviation of each column; that of a column that is constant in float32 is 1."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for block in blocks:
        wide = block.double()
        count, total, squares = count + len(wide), total + wide.sum(0), squares + (wide ** 2).sum(0)
    mean = total / count
    deviation = (squares / count - mean ** 2).clamp(min=0).sqrt()
    deviation[deviation <= torch.finfo(torch.float32).eps * mean.abs()] = 1
    return mean.float(), deviation.float()
