# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Scores of classes."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from llm2clip.metrics import classification
from llm2clip.metrics.classification import (
    MeanAveragePrecision,
    MeanPerClass,
    ZeroshotTop1,
    average_precision,
    class_ranks,
    class_scores,
)


def test_classes_of_the_same_features_have_the_same_scores() -> None:
    """Also where a matrix product rounds equal columns in different ways, as x86 CPUs do at this size."""
    generator = torch.Generator().manual_seed(0)
    images, weights = (torch.randn(rows, 185, generator=generator) for rows in (53, 3))
    scores = class_scores(images, torch.cat([weights, weights]))
    assert scores[:, :3].equal(scores[:, 3:])
    torch.testing.assert_close(scores[:, :3], images @ weights.T, rtol=1e-5, atol=1e-4)


def test_ranks_are_the_same_in_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images, weights = (torch.randn(rows, 8, generator=generator) for rows in (23, 5))
    labels = torch.randint(0, 5, (23,), generator=generator)
    whole = class_ranks(images, weights, labels)
    order = (images @ weights.T).argsort(1, descending=True)
    assert whole.tolist() == [row.tolist().index(label) for row, label in zip(order, labels)]
    monkeypatch.setattr(classification, '_SCORES', 20)
    assert class_ranks(images, weights, labels).equal(whole)
    # Scores that are no numbers are wrong.
    assert class_ranks(torch.eye(3) * torch.nan, torch.eye(3), torch.arange(3)).tolist() == [3, 3, 3]


@pytest.mark.parametrize('size', [0.1, 30.0])  # cosines, and logits whose sigmoid is 1
def test_average_precision_of_ties_and_of_a_class_without_images(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = size * torch.randn(200, 4, generator=generator)
    scores[50:100] = scores[:50]
    targets = torch.rand(200, 4, generator=generator).lt(0.1).long()
    targets[:, 2] = 0
    expected = [average_precision_score(targets[:, c], scores[:, c]) if c != 2 else 0 for c in range(4)]
    assert average_precision(scores, targets).tolist() == pytest.approx(expected, abs=1e-6)


def test_metrics_take_batches_in_any_order_and_repeated_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images, weights = (torch.randn(rows, 8, generator=generator) for rows in (23, 5))
    labels = torch.randint(0, 4, (23,), generator=generator)  # no image has the last class
    images[9:15] = images[3:9]  # ties
    several = torch.rand(23, 5, generator=generator).lt(0.4).long()
    several[:, 4] = torch.arange(23).eq(7)  # a single image has the last class
    top1, mean, precision = ZeroshotTop1(), MeanPerClass(), MeanAveragePrecision()
    for index in torch.cat([torch.randperm(23, generator=generator), torch.tensor([0, 7])]).split(6):
        for metric, target in ((top1, labels), (mean, labels), (precision, several)):
            metric.update(images[index], weights, target[index], index)
    scores = images @ weights.T
    hits = [(row.argmax() == label).item() for row, label in zip(scores, labels)]
    assert top1.compute() == pytest.approx(100 * sum(hits) / 23) and 0 < sum(hits) < 23
    shares = [[hit for hit, label in zip(hits, labels.tolist()) if label == c] for c in range(4)]
    assert mean.compute() == pytest.approx(100 * sum(sum(of) / len(of) for of in shares) / 4)
    precisions = [average_precision_score(several[:, c], scores[:, c]) for c in range(5)]
    assert precision.compute() == pytest.approx(100 * sum(precisions) / 5)
