# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Drawing a caption: reproducible, and in proportion."""

from collections import Counter

from llm2clip.data.captions import draw, sample_seed


def test_a_draw_depends_on_seed_epoch_and_sample_alone() -> None:
    assert sample_seed(1, 2, 'x') == sample_seed(1, 2, 'x')
    assert len({sample_seed(s, e, i) for s in (0, 1) for e in (0, 1) for i in ('x', 'y')}) == 8


def test_draws_follow_the_weights() -> None:
    counts = Counter(draw([1, 3, 0], sample_seed(0, epoch, str(i))) for epoch in range(4) for i in range(2000))
    assert 0.22 < counts[0] / 8000 < 0.28 and counts[2] == 0
