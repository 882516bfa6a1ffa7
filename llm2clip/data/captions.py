# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which caption of a sample is seen: a pure function of (seed, epoch, sample id)."""

from collections.abc import Sequence
from typing import Optional

import xxhash

from llm2clip.config import CaptionPairConfig

__all__ = ['draw', 'draw_pair', 'sample_seed', 'text_id']


def sample_seed(seed: int, epoch: int, sample_id: str) -> int:
    """A 64-bit seed for everything random about one sample in one epoch.

    It does not depend on workers, ranks, batches or on where a run was resumed.
    """
    return xxhash.xxh64_intdigest(f'{epoch}/{sample_id}', seed=seed)


def draw(weights: Sequence[float], seed: int, what: str = 'caption') -> int:
    """An index, drawn in proportion to `weights`, the same for the same seed and purpose."""
    point = xxhash.xxh64_intdigest(what, seed=seed) / 2**64 * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


def draw_pair(pairs: Sequence[CaptionPairConfig], seed: int) -> tuple[CaptionPairConfig, str, str]:
    """A direction, and the caption keys of query and positive, which differ."""
    pair = pairs[draw([pair.weight for pair in pairs], seed)]
    query = pair.query[draw([1] * len(pair.query), seed, 'query')]
    others = [key for key in pair.positive if key != query]
    return pair, query, others[draw([1] * len(others), seed, 'positive')]


def text_id(text: Optional[str]) -> int:
    """A number that stands for the text, equal for equal texts; 0 for none."""
    return (xxhash.xxh64_intdigest(text) >> 1) or 1 if text else 0
