# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Bootstrap intervals against the normal approximation."""

import pytest
import torch

from llm2clip.metrics.bootstrap import Outcomes


def _interval(values: torch.Tensor, group: torch.Tensor, resamples: int = 1000, seed: int = 0) -> list[float]:
    low, high = Outcomes(('m',), values, group, int(group.max()) + 1).intervals(resamples, seed)['m']
    return [low / 100, high / 100]


def test_interval_of_independent_values() -> None:
    values = (torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    low, high = _interval(values, torch.arange(2000), resamples=2000)
    mean = values.mean().item()
    half = 1.96 * (mean * (1 - mean) / 2000) ** 0.5
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))


def test_values_of_a_group_are_drawn_together() -> None:
    values = (torch.rand(200, 1, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    alone = _interval(values, torch.arange(200))
    # Five copies of each value, which say nothing new.
    copies = _interval(values.repeat_interleave(5, 0), torch.arange(200).repeat_interleave(5))
    assert copies == pytest.approx(alone, abs=1e-9)


def test_each_class_counts_the_same_and_is_drawn_by_itself() -> None:
    classes = torch.tensor([4, 0, 4, 1, 4, 4, 1])
    values = torch.stack([classes.double(), torch.tensor([1.0, 0, 0, 1, 0, 0, 0])], dim=1)
    means = Outcomes(('a', 'b'), values, torch.arange(7), 7, classes).resampled(300)
    # What is the same within each class is the same in every resample, with one image as with four.
    assert (means[:, 0] - 5 / 3).abs().max() < 1e-12
    # One of two in a class, and one of four: k and m / 3 of one and of three draws, over three classes.
    assert {round(9 * mean) for mean in means[:, 1].tolist()} == {0, 1, 2, 3, 4, 5, 6}
    assert means[:, 1].mean().item() == pytest.approx((1 / 2 + 1 / 4) / 3, abs=0.02)


def test_the_variance_of_small_classes_is_not_underestimated() -> None:
    hits = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0] * 3 + [1, 0, 1, 1])
    classes = torch.tensor([0] * 8 + [1] * 8 + [2] * 8 + [3] * 4)
    outcomes = Outcomes(('mean',), hits[:, None], torch.arange(28), 28, classes)
    expected = sum(hits[classes == c].float().var() / (classes == c).sum() for c in range(4)) / 4 ** 2
    found = outcomes.resampled(20_000).var()
    assert float(found) == pytest.approx(float(expected), rel=0.04)
