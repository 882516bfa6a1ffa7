# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Encoded images -> features, in order; those of evaluation sets are kept in files until an evaluation is finished."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llm2clip.evaluation.models import EvaluatedModel
from llm2clip.evaluation.sets.files import EvaluationSet
from llm2clip.ranks import agreed, in_turns, is_first, rows
from llm2clip.weights import read_safetensors, tensors_hash, write_safetensors

__all__ = ['EncodedBatch', 'ImageFeatures', 'KeptRows', 'encode_batches', 'finite']

# Images of a file: few enough for its features to be held several times, and to lose.
_BLOCK = 16384
_EXPECTED = 'features of images; remove it to compute them again'


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
        """Position, pixels and hash; or in place of pixels why there are none."""
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
    """As `EncodedBatch`, with stacked pixels in place of features, if there are any."""
    read = {index: pixels for index, pixels, _ in samples if isinstance(pixels, torch.Tensor)}
    unreadable = {index: why for index, why, _ in samples if isinstance(why, str)}
    return (list(read), torch.stack(list(read.values())) if read else None, unreadable,
            ''.join(found for *_, found in samples))


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


@dataclass(frozen=True)
class KeptRows:
    """A matrix in files, of which one at a time is in memory; it may be read as often as one likes."""

    files: Sequence[Path]
    name: str
    """Of the tensor in each."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Its rows, block after block."""
        for path in self.files:
            yield read_safetensors(path, _EXPECTED).tensors[self.name]

    def whole(self) -> torch.Tensor:
        """All rows; none on other ranks than the first."""
        return rows(self)


class ImageFeatures:
    """A model's features of the sets' images, computed once for sets of the same images.

    They are kept in a folder, so that a killed evaluation goes on after the block of images at which it was, unless the
    images have changed meanwhile.

    Args:
        model: Which encodes.
        name: Of the model in the tables.
        folder: Of the files.
        batch_size: Images per forward pass.
        num_workers: Processes per rank that read and decode.
    """

    def __init__(self, model: EvaluatedModel, name: str, folder: Path, batch_size: int, num_workers: int) -> None:
        self.model, self.name, self.folder = model, name, folder
        self.batch_size, self.num_workers = batch_size, num_workers
        self._current: set[Path] = set()

    @cached_property
    def weights(self) -> str:
        """Hash of the model's weights."""
        return tensors_hash(self.model.model.state_dict())

    def __call__(self, dataset: EvaluationSet) -> tuple[KeptRows, KeptRows]:
        """Features ``(N, D)`` and pooled states ``(N, W)``, on the first rank; the others, which call this too, have no
        rows."""
        files: dict[range, Path] = {}
        if is_first():
            what = [self.name, self.weights, self.model.precision, repr(dataset.read_image), dataset.image_ids]
            name, n = xxhash.xxh64(json.dumps(what)).hexdigest(), len(dataset.image_ids)
            files = {range(start, min(start + _BLOCK, n)): self.folder / f'{name}-{start}.safetensors'
                     for start in range(0, n, _BLOCK)}
        missing = agreed(lambda: [positions for positions, path in files.items()
                                  if not self._is_current(path, dataset, positions)])
        total = -(-sum(map(len, missing)) // self.batch_size)
        with tqdm(total=total, desc=f'{self.name} on {dataset.name}', unit=' batches',
                  disable=not is_first() or not missing) as progress:
            for positions in missing:
                names = [dataset.image_ids[position] for position in positions]
                features, pooled, hashes = [], [], ''
                for batch in encode_batches(self.model, partial(_read, dataset.read_image, positions), names,
                                            self.batch_size, self.num_workers):
                    features.append(batch.features)
                    pooled.append(batch.pooled)
                    hashes += batch.hashes
                    progress.update()
                projected = finite(rows(features), f'{self.name}: features of images of {dataset.name}')
                states = finite(rows(pooled), f'{self.name}: pooled states of images of {dataset.name}')
                if is_first():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_safetensors(files[positions], {'projected': projected, 'pooled': states},
                                      {'images': xxhash.xxh64_hexdigest(hashes)})
                    self._current.add(files[positions])
        return KeptRows([*files.values()], 'projected'), KeptRows([*files.values()], 'pooled')

    def _is_current(self, path: Path, dataset: EvaluationSet, positions: range) -> bool:
        """Whether a file is there, and its images are, byte by byte, those that are there now."""
        if path not in self._current and path.is_file():
            # Not in this process alone, which would wait for each image.
            hashes = DataLoader(positions, self.batch_size,  # pyright: ignore[reportArgumentType]
                                num_workers=self.num_workers, collate_fn=partial(_hashes, dataset.read_image))
            if read_safetensors(path, _EXPECTED).about.get('images') == xxhash.xxh64_hexdigest(''.join(hashes)):
                self._current.add(path)
        return path in self._current


def finite(features: torch.Tensor, what: str) -> torch.Tensor:
    """The features; raises a ValueError that names them if one is infinite or no number."""
    if not features.isfinite().all():
        raise ValueError(f'{what} are not finite, expected weights and a precision that give numbers')
    return features


def _hashes(read_image: Callable[[int], bytes], positions: Sequence[int]) -> str:
    return ''.join(xxhash.xxh64_hexdigest(read_image(position)) for position in positions)


def _read(read_image: Callable[[int], bytes], positions: range, at: int) -> bytes:
    """One of the images at these positions."""
    return read_image(positions[at])
