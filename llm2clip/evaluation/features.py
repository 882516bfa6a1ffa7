# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A model's features of evaluation sets' images, computed once and kept in files until the evaluation is finished."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Union

import torch
import xxhash
from torch.utils.data import DataLoader
from tqdm import tqdm

from llm2clip.evaluation.images import encode_batches
from llm2clip.evaluation.models import EvaluatedModel
from llm2clip.evaluation.sets.files import ClassificationSet, CompositionSet, RetrievalSet
from llm2clip.ranks import agreed, is_first, rows
from llm2clip.weights import hash_tensors, read_safetensors, write_safetensors

__all__ = ['EvaluationSet', 'ImageFeatures', 'KeptRows', 'finite']

EvaluationSet = Union[RetrievalSet, ClassificationSet, CompositionSet]

# Images of a file: few enough for its features to be held several times, and to lose.
_BLOCK = 16384
_EXPECTED = 'features of images; remove it to compute them again'


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
    def _weights(self) -> str:
        digest = xxhash.xxh64()
        hash_tensors(self.model.model.state_dict(), digest)
        return digest.hexdigest()

    def _files(self, dataset: EvaluationSet) -> dict[range, Path]:
        """Positions of images -> the file that has or will have their features."""
        what = json.dumps([self.name, self._weights, self.model.precision, repr(dataset.read_image), dataset.image_ids])
        name, n = xxhash.xxh64(what).hexdigest(), len(dataset.image_ids)
        return {range(start, min(start + _BLOCK, n)): self.folder / f'{name}-{start}.safetensors'
                for start in range(0, n, _BLOCK)}

    def __call__(self, dataset: EvaluationSet) -> tuple[KeptRows, KeptRows]:
        """Features ``(N, D)`` and pooled states ``(N, W)``, on the first rank; the others, which call this too, have no
        rows."""
        files = self._files(dataset) if is_first() else {}
        missing = agreed(lambda: [positions for positions, path in files.items()
                                  if not self._is_current(path, dataset, positions)])
        total = -(-sum(map(len, missing)) // self.batch_size)
        with tqdm(total=total, desc=f'{self.name} on {dataset.name}', unit=' batches',
                  disable=not is_first() or not missing) as progress:
            for positions in missing:
                features, pooled, images = self._encode(dataset, positions, progress)
                if is_first():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_safetensors(files[positions], {'projected': features, 'pooled': pooled}, {'images': images})
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

    def _encode(
        self, dataset: EvaluationSet, positions: range, progress: tqdm
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Features, pooled states, and a hash of the images that they are of."""
        features, pooled, hashes = [], [], ''
        names = [dataset.image_ids[position] for position in positions]
        for batch in encode_batches(self.model, partial(_read, dataset.read_image, positions), names, self.batch_size,
                                    self.num_workers):
            features.append(batch.features)
            pooled.append(batch.pooled)
            hashes += batch.hashes
            progress.update()
        return (finite(rows(features), f'{self.name}: features of images of {dataset.name}'),
                finite(rows(pooled), f'{self.name}: pooled states of images of {dataset.name}'),
                xxhash.xxh64_hexdigest(hashes))


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
