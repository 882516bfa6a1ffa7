# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches of tokenised texts: token counts, splitting into microbatches by length, packing into one row."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llm2clip.modeling.text_encoder import pack

_IDS, _MASK = 'input_ids', 'attention_mask'


def count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Return Composer's token counts of a padded or packed batch: tokens without padding, and those with a
    loss."""
    total = 0
    for side in text_sides(batch):
        if side + _MASK in batch:
            total += int(batch[side + _MASK].sum())
        else:
            total += batch[side + _IDS].numel()
    if 'labels' not in batch:
        return {'total': total, 'loss_generating': total}
    return {'total': total, 'loss_generating': int((batch['labels'] >= 0).sum())}


def text_sides(batch: dict[str, Any]) -> list[str]:
    """Return the prefixes of a batch's texts: ``query_``, ``positive_``, …; one empty prefix if packed."""
    return [key.removesuffix(_IDS) for key in batch if key.endswith(_IDS)]


def split_packed(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch by `split_by_length`, and pack the texts of each part into one row by `pack_sides`."""
    packed: list[dict[str, Any]] = []
    for part in split_by_length(batch, microbatch_size):
        lengths: list[int] = []
        for side in text_sides(part):
            lengths += part[side + _MASK].sum(1).tolist()
        packed.append(pack_sides(part, lengths))
    return packed


def pack_sides(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """Pack all texts of a stage-1 batch into one row without padding, as `pack` describes.

    Args:
        batch: Batch with padded texts.
        lengths: Number of tokens of each text, side after side in the order of the batch.
    """
    sides = text_sides(batch)
    longest = max(batch[side + _MASK].shape[1] for side in sides)
    others = dict(batch)
    texts: dict[str, torch.Tensor] = {}
    for name, value in batch.items():
        has_tokens = isinstance(value, torch.Tensor) and value.ndim == 2
        if not has_tokens or not name.startswith(sides[0]):
            continue
        name = name.removeprefix(sides[0])
        parts: list[torch.Tensor] = []
        for side in sides:
            part = others.pop(side + name)
            parts.append(F.pad(part, (0, longest - part.shape[1])))
        texts[name] = torch.cat(parts)
    del texts[_MASK]
    packed = pack(texts, lengths)
    if torch.cuda.is_initialized():  # copies from pinned memory to the GPU are asynchronous
        for name, value in packed.items():
            if isinstance(value, torch.Tensor):
                packed[name] = torch.empty_like(value, pin_memory=True).copy_(value)
    return others | packed


def split_by_length(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch into parts, each side's texts sorted by decreasing length, and trim each part's padding.

    The tensors of a side stay aligned.  Sides are sorted independently, so a part mixes texts of different
    samples.  This suits a loss per text, or `GradCache`, which uses the loss of the whole batch.

    Args:
        batch: Tensors ``(B,)`` and ``(B, T)`` and lists of length B; each side has an ``attention_mask``,
            padded on the right.
        microbatch_size: Samples per part; the last may be smaller.  A batch up to this size stays unchanged.
    """
    n = len(batch['index'])
    if n <= microbatch_size:
        return [batch]
    sides = text_sides(batch)
    order = {side: batch[side + _MASK].sum(1).argsort(descending=True, stable=True) for side in sides}
    parts: list[dict[str, Any]] = []
    for start in range(0, n, microbatch_size):
        stop = start + microbatch_size
        rows = {side: order[side][start:stop] for side in sides}
        length = {side: int(batch[side + _MASK][rows[side]].sum(1).max()) for side in sides}
        part: dict[str, Any] = {}
        for name, value in batch.items():
            side = next((side for side in sides if name.startswith(side)), None)
            if side is None:
                part[name] = value[start:stop]
            elif isinstance(value, list):
                part[name] = [value[row] for row in rows[side].tolist()]
            elif value.ndim == 1:
                part[name] = value[rows[side]]
            else:
                part[name] = value[rows[side], :length[side]]
        parts.append(part)
    return parts
