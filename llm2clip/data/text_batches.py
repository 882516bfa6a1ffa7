# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches of tokenised texts: token counts, splitting into microbatches by length, packing into one row."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F

from llm2clip.modeling.text_encoder import pack
from llm2clip.ranks import dist

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


def split_packed(
    batch: dict[str, Any], microbatch_size: int, max_tokens: Optional[int] = None
) -> list[dict[str, Any]]:
    """Split a batch by `split_by_length`, and pack the texts of each part into one row by `pack_sides`."""
    packed: list[dict[str, Any]] = []
    for part in split_by_length(batch, microbatch_size, max_tokens):
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


def split_by_length(
    batch: dict[str, Any], microbatch_size: int, max_tokens: Optional[int] = None
) -> list[dict[str, Any]]:
    """Split a batch into parts, each side's texts sorted by decreasing length, and trim each part's padding.

    The tensors of a side stay aligned.  Sides are sorted independently, so a part mixes texts of different
    samples.  This suits a loss per text, or `GradCache`, which uses the loss of the whole batch.

    Args:
        batch: Tensors ``(B,)`` and ``(B, T)`` and lists of length B; each side has an ``attention_mask``,
            padded on the right.
        microbatch_size: Samples per part; the last may be smaller.  A batch up to this size stays unchanged.
        max_tokens: Tokens per part over all sides, or one of each side's texts.  Every rank gets as many
            parts as the rank that needs most, so all ranks have to call this with batches of one size.
    """
    n = len(batch['index'])
    sides = text_sides(batch)
    lengths = {side: batch[side + _MASK].sum(1) for side in sides}
    starts = list(range(0, n, microbatch_size))
    if max_tokens is not None:
        longest_first = [side_lengths.sort(descending=True).values for side_lengths in lengths.values()]
        starts = _starts(torch.stack(longest_first).sum(0).tolist(), microbatch_size, max_tokens)
    if len(starts) == 1:
        return [batch]
    order = {side: lengths[side].argsort(descending=True, stable=True) for side in sides}
    parts: list[dict[str, Any]] = []
    for start, stop in zip(starts, [*starts[1:], n]):
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


def _starts(tokens: Sequence[int], microbatch_size: int, max_tokens: int) -> list[int]:
    """Return where the parts of a batch begin, given the tokens of each sample, as many on every rank."""
    starts = [0]
    size = 0
    for i, sample_tokens in enumerate(tokens):
        is_full = i - starts[-1] == microbatch_size or size + sample_tokens > max_tokens
        if i and is_full:
            starts.append(i)
            size = 0
        size += sample_tokens
    most = max(dist.all_gather_object(len(starts)))
    while len(starts) < most:  # halve the part with the most samples
        sizes = [stop - start for start, stop in zip(starts, [*starts[1:], len(tokens)])]
        largest = sizes.index(max(sizes))
        starts.insert(largest + 1, starts[largest] + sizes[largest] // 2)
    return starts
