# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Scores of classes."""

import pytest
import torch

from llm2clip.metrics import classification
from llm2clip.metrics.classification import class_ranks, class_scores


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
