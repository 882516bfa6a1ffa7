# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Encoded images -> features, in order: those of an evaluation set, none left out, or files that may be damaged."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional, Union

import torch
import xxhash
from torch.utils.data import DataLoader, Dataset

from llm2clip.evaluation.models import EvaluatedModel
from llm2clip.ranks import in_turns

__all__ = ['EncodedBatch', 'encode_batches']


class EncodedBatch(NamedTuple):
    """B images that follow one another, of which b could be read."""

    positions: list[int]
    """Of the b images."""
    features: torch.Tensor
    """``(b, D)``, of length 1, in float32 on the CPU."""
    pooled: torch.Tensor
    """What the tower says before it is projected, ``(b, W)``, in float32 on the CPU."""
    unreadable: dict[int, str]
    """Position -> why, which names the image; of the others."""
    hashes: str
    """Those of the b encoded images, one after the other."""


class _Images(Dataset):

    def __init__(
        self, read_image: Callable[[int], bytes], names: Sequence[str],
        preprocess: Callable[[bytes, str], torch.Tensor], keep_going: bool,
    ) -> None:
        self.read_image, self.names, self.preprocess, self.keep_going = read_image, names, preprocess, keep_going

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, Union[torch.Tensor, str], str]:
        try:
            data = self.read_image(index)
            return index, self.preprocess(data, self.names[index]), xxhash.xxh64_hexdigest(data)
        except Exception as error:  # whatever a decoder raises, it is about this image, and the others go on
            if not self.keep_going:
                raise
            reason = str(error) if isinstance(error, (OSError, ValueError)) else f'{self.names[index]}: {error!r}'
            return index, re.sub(r' <\S+ object at \w+>', '', reason), ''


def _collate(
    samples: list[tuple[int, Union[torch.Tensor, str], str]]
) -> tuple[list[int], Optional[torch.Tensor], dict[int, str], str]:
    """Positions and stacked pixels of what could be read, if anything could, why the rest could not, and hashes."""
    read = {index: pixels for index, pixels, _ in samples if isinstance(pixels, torch.Tensor)}
    unreadable = {index: why for index, why, _ in samples if isinstance(why, str)}
    hashes = ''.join(found for *_, found in samples)
    return list(read), torch.stack(list(read.values())) if read else None, unreadable, hashes


def encode_batches(
    model: EvaluatedModel,
    read_image: Callable[[int], bytes],
    names: Sequence[str],
    batch_size: int = 64,
    num_workers: int = 2,
    keep_going: bool = False,
) -> Iterator[EncodedBatch]:
    """Features of images, batch after batch, in order.

    Every rank calls this.  They take turns: the batches are those of one rank, and all of them come to the first.

    Args:
        model: Which encodes.
        read_image: Position -> encoded image; picklable.
        names: Of the N images, for messages.
        batch_size: Images per forward pass.
        num_workers: Processes per rank that read and decode.
        keep_going: An image that cannot be read or decoded does not end the pass but is among the `unreadable`.

    Raises:
        ValueError: An image cannot be decoded; names it.
    """
    images = _Images(read_image, names, model.preprocess, keep_going)
    batches = [range(start, min(start + batch_size, len(names))) for start in range(0, len(names), batch_size)]

    def encode(batches: Sequence[range]) -> Iterator[EncodedBatch]:
        loader = DataLoader(images, batch_sampler=[*map(list, batches)], num_workers=num_workers, collate_fn=_collate,
                            pin_memory=model.device.type == 'cuda')
        for positions, pixel_values, unreadable, hashes in loader:
            features = pooled = torch.empty(0, 0)
            if pixel_values is not None:
                features, pooled = (x.cpu() for x in model.image_features(pixel_values.to(model.device)))
            yield EncodedBatch(positions, features, pooled, unreadable, hashes)

    return in_turns(batches, encode)
