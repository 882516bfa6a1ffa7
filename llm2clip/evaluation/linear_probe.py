# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Linear probes: how well a linear classifier tells classes apart by a frozen tower's features."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from tqdm import tqdm

from llm2clip.config import SGDProbeConfig
from llm2clip.evaluation.classification import accuracy_metrics
from llm2clip.metrics.bootstrap import Outcomes

__all__ = ['check_probe_labels', 'linear_probe', 'sgd_logits', 'sgd_probe']

# Inverse strengths of the regularisation that the probe chooses from.
_C = tuple(10.0 ** power for power in range(-2, 5))


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
    values, outcomes = _metrics(logits, test_labels, classes, resamples)
    return {**values, **probe.best_params_}, outcomes


def sgd_probe(
    train: Iterable[torch.Tensor], train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor,
    classes: Sequence[str], config: SGDProbeConfig, device: Union[str, torch.device] = 'cpu', resamples: int = 1000,
) -> tuple[dict[str, Any], list[Outcomes]]:
    """`sgd_logits`, as `zeroshot_metrics` reports.

    Args:
        train: ``(N, W)``, in blocks of rows.
        train_labels: ``(N,)``, every class of the test at least once.
        test: ``(M, W)``.
        test_labels: ``(M,)``.
        classes: C names.
        config: Of the training.
        device: Where it runs.
        resamples: Of the bootstrap.
    """
    logits = sgd_logits(train, train_labels, test, len(classes), config, device)
    return _metrics(logits, test_labels, classes, resamples)


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


def _metrics(
    logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], resamples: int
) -> tuple[dict[str, Any], list[Outcomes]]:
    """A class that scores the same as the right one comes before it, and so does one whose score is no number."""
    ranks = (~(logits < logits.gather(1, labels[:, None]))).sum(1) - 1
    return accuracy_metrics(ranks, labels, classes, 'linear_probe', resamples)
