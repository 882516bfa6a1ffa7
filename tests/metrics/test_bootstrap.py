# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Means over classes; resamples of groups are compared with naive ones in `evaluation/test_comparison.py`."""

import pytest
import torch

from llm2clip.metrics.bootstrap import Outcomes


def test_each_class_counts_the_same_and_is_drawn_by_itself() -> None:
    classes = torch.tensor([4, 0, 4, 1, 4, 4, 1])
    values = torch.stack([classes.double(), torch.tensor([1.0, 0, 0, 1, 0, 0, 0])], dim=1)
    means = Outcomes(('a', 'b'), values, torch.arange(7), 7, classes).resampled(300)
    # What is the same within each class is the same in every resample, with one image as with four.
    assert (means[:, 0] - 5 / 3).abs().max() < 1e-12
    # One of two in a class, and one of four: k and m / 3 of one and of three draws, over three classes.
    assert {round(9 * mean) for mean in means[:, 1].tolist()} == {0, 1, 2, 3, 4, 5, 6}
    assert means[:, 1].mean().item() == pytest.approx((1 / 2 + 1 / 4) / 3, abs=0.02)
