# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image encoding in batches, and image features that are kept in files until an evaluation is finished."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llm2clip.data.classification_sets import ClassificationSet
from llm2clip.evaluation.evaluated_models import EvaluatedModel
from llm2clip.evaluation.retrieval_sets import RetrievalSet
from llm2clip.io.tensors import hash_tensors, read_safetensors, write_safetensors
from llm2clip.ranks import broadcast_from_rank0, is_first, round_robin, rows

EvaluationSet = Union[RetrievalSet, ClassificationSet]

# Images per file: its features fit into memory several times, and a killed evaluation loses no more.
_BLOCK = 16384


class EncodedBatch(NamedTuple):
    """Features of a batch of consecutive images, b of them readable."""

    positions: list[int]
    """Positions of the b images."""
    features: torch.Tensor
    """``(b, D)`` unit vectors, float32 on the CPU."""
    pooled: torch.Tensor
    """``(b, W)`` pooled states of the tower before the projection, float32 on the CPU."""
    unreadable: dict[int, str]
    """Position -> error message with the image's name, for the other images."""


@dataclass
class _Images(Dataset):

    read_image: Callable[[int], bytes]
    names: Sequence[str]
    preprocess: Callable[[bytes, str], torch.Tensor]
    keep_going: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, Union[torch.Tensor, str]]:
        """Position, and pixels or an error message."""
        try:
            return index, self.preprocess(self.read_image(index), self.names[index])
        except (OSError, ValueError) as error:
            if not self.keep_going:
                raise
            return index, str(error)


def _collate(
    samples: list[tuple[int, Union[torch.Tensor, str]]]
) -> tuple[list[int], Optional[torch.Tensor], dict[int, str]]:
    """Positions of the readable images, their stacked pixels or None, and position -> error of the others."""
    readable: dict[int, torch.Tensor] = {}
    unreadable: dict[int, str] = {}
    for position, pixels in samples:
        if isinstance(pixels, str):
            unreadable[position] = pixels
        else:
            readable[position] = pixels
    pixel_values = torch.stack([*readable.values()]) if readable else None
    return [*readable], pixel_values, unreadable


def encode_batches(
    model: EvaluatedModel, read_image: Callable[[int], bytes], names: Sequence[str], positions: range,
    batch_size: int, num_workers: int, keep_going: bool = False,
) -> Iterator[EncodedBatch]:
    """Yield the features of images batch by batch, in order.

    Every rank calls this.  The ranks encode batches in turn, and the first yields all of them, the others
    none.  The batches do not depend on the number of ranks.

    Args:
        model: Encodes the images.
        read_image: Position -> encoded image; picklable.
        names: Names of all images, for messages.
        positions: Positions of the images to encode.
        batch_size: Images per forward pass.
        num_workers: Worker processes per rank that read and decode images.
        keep_going: Add images that cannot be read or decoded to `unreadable` instead of raising.

    Raises:
        ValueError: An image cannot be decoded, without `keep_going`; the message names it.
    """
    images = _Images(read_image, names, model.preprocess, keep_going)
    batches = [positions[start:start + batch_size] for start in range(0, len(positions), batch_size)]

    def encode(batches: Sequence[range]) -> Iterator[EncodedBatch]:
        loader = DataLoader(images, batch_sampler=[*map(list, batches)], num_workers=num_workers,
                            collate_fn=_collate, pin_memory=model.device.type == 'cuda')
        for readable, pixel_values, unreadable in loader:
            features = pooled = torch.empty(0, 0)
            if pixel_values is not None:
                features, pooled = model.image_features(pixel_values.to(model.device))
            yield EncodedBatch(readable, features.cpu(), pooled.cpu(), unreadable)

    return round_robin(batches, encode)


@dataclass(frozen=True)
class KeptRows:
    """Matrix stored in blocks of rows, one file each, read one at a time; can be iterated repeatedly."""

    files: Sequence[Path]
    name: str
    """Name of the tensor in each file."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the rows block by block."""
        for path in self.files:
            kept = read_safetensors(path, 'features of images; remove it to compute them again')
            yield kept.tensors[self.name]


@dataclass
class ImageFeatures:
    """Image features of a model, computed once for all sets with the same images.

    Files in `folder` keep them, so that a killed evaluation resumes at the first missing block.
    """

    model: EvaluatedModel
    name: str
    """Name of the model in the tables."""
    folder: Path
    batch_size: int
    num_workers: int

    @cached_property
    def weights(self) -> str:
        """Hash of the model's weights."""
        return hash_tensors(self.model.model.state_dict())

    def encode(self, dataset: EvaluationSet) -> tuple[KeptRows, KeptRows]:
        """Return features of all N images of a set, whose files the first rank writes; every rank calls this.

        The first are unit vectors ``(N, D)``, the second the pooled states ``(N, W)`` of the tower before the
        projection.
        """
        ids = dataset.image_ids
        sources = [self.name, self.weights, self.model.precision, repr(dataset.read_image), ids]
        key = xxhash.xxh64(json.dumps(sources)).hexdigest()
        files: dict[range, Path] = {}
        for start in range(0, len(ids), _BLOCK):
            block = range(start, min(start + _BLOCK, len(ids)))
            files[block] = self.folder / f'{key}-{start}.safetensors'
        missing = broadcast_from_rank0(lambda: [block for block, path in files.items() if not path.is_file()])
        total = -(-sum(map(len, missing)) // self.batch_size)
        with tqdm(total=total, desc=f'{self.name} on {dataset.name}', unit=' batches',
                  disable=not is_first() or not missing) as progress:
            for block in missing:
                features = []
                pooled = []
                for batch in encode_batches(self.model, dataset.read_image, dataset.image_ids, block,
                                            self.batch_size, self.num_workers):
                    features.append(batch.features)
                    pooled.append(batch.pooled)
                    progress.update()
                projected = finite(rows(features), f'{self.name}: features of images of {dataset.name}')
                states = finite(rows(pooled), f'{self.name}: pooled states of images of {dataset.name}')
                if is_first():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_safetensors(files[block], {'projected': projected, 'pooled': states}, {})
        return KeptRows([*files.values()], 'projected'), KeptRows([*files.values()], 'pooled')


def finite(features: torch.Tensor, description: str) -> torch.Tensor:
    """Return the features; raise a ValueError with the description if one is infinite or NaN."""
    if not features.isfinite().all():
        raise ValueError(f'{description} are not finite, expected weights and a precision that give numbers')
    return features
