# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which caption of a sample is seen: a pure function of (seed, epoch, sample id)."""

from collections.abc import Sequence

import xxhash

__all__ = ['draw', 'sample_seed']


def sample_seed(seed: int, epoch: int, sample_id: str) -> int:
    """A 64-bit seed for everything random about one sample in one epoch.

    It does not depend on workers, ranks, batches or on where a run was resumed.
    """
    return xxhash.xxh64_intdigest(f'{epoch}/{sample_id}', seed=seed)


def draw(weights: Sequence[float], seed: int) -> int:
    """An index, drawn in proportion to `weights`, the same for the same seed."""
    point = xxhash.xxh64_intdigest(b'caption', seed=seed) / 2**64 * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)
