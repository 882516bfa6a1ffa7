# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Microbatches of texts of similar length, which need little padding."""

from typing import Any

__all__ = ['split_by_length', 'text_sides']

_MASK = 'attention_mask'


def text_sides(batch: dict[str, Any]) -> list[str]:
    """Prefixes of the padded texts in a batch: ``query_``, ``positive_``, … or an empty one."""
    return [key.removesuffix(_MASK) for key in batch if key.endswith(_MASK)]


def split_by_length(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch, each side's texts in the order of their length, and cut the padding that a part does not need.

    A side's tensors stay together.  Different sides are ordered independently, so a part holds texts of different
    samples: fit for a loss on each text by itself, or for `GradCache`, whose loss is that of the whole batch.  A batch
    that is not larger than a microbatch stays as it is.

    Args:
        batch: Tensors ``(B,)`` and ``(B, T)`` and lists of length B; each text side has an ``attention_mask``, padded
            on the right.
        microbatch_size: Samples per part; the last may be smaller.
    """
    n = len(batch['index'])
    if n <= microbatch_size:
        return [batch]
    sides = text_sides(batch)
    order = {side: batch[side + _MASK].sum(1).argsort(descending=True, stable=True) for side in sides}
    parts: list[dict[str, Any]] = []
    for start in range(0, n, microbatch_size):
        rows = {side: order[side][start:start + microbatch_size] for side in sides}
        length = {side: int(batch[side + _MASK][rows[side]].sum(1).max()) for side in sides}
        part = {}
        for key, value in batch.items():
            side = max((side for side in sides if key.startswith(side)), key=len, default=None)
            if side is None:
                part[key] = value[start:start + microbatch_size]
            elif isinstance(value, list):
                part[key] = [value[row] for row in rows[side].tolist()]
            else:
                part[key] = value[rows[side]] if value.ndim == 1 else value[rows[side], :length[side]]
        parts.append(part)
    return parts
