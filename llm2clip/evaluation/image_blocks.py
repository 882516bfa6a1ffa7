# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Images of datasets and evaluation sets in blocks, of which one at a time is read, with hashes and features that are
kept in a file per block."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from streaming.base.format.base.reader import Reader
from tqdm import tqdm

from llm2clip.config import BenchmarksConfig, DatasetConfig
from llm2clip.data.image_hashes import KIND, VIEWS, WORDS, decode_grey, image_hashes
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, check_columns, read_index, shard_fingerprint
from llm2clip.data.streams.paired_stream import columns_of
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.engine import LocalEngine
from llm2clip.evaluation.features import EvaluationSet
from llm2clip.evaluation.images import encode_batches
from llm2clip.evaluation.models import EvaluatedModel
from llm2clip.evaluation.sets.files import ClassificationSet, RetrievalSet
from llm2clip.files import parse_json
from llm2clip.registry import build_classification_set, build_composition_set, build_retrieval_set
from llm2clip.weights import hash_tensors, read_safetensors, write_safetensors

__all__ = [
    'Block', 'Hashes', 'Images', 'ShownImage', 'dataset_images', 'evaluation_images', 'hash_blocks', 'keep_features',
    'read_features', 'read_hashes', 'set_fingerprint',
]

# Images of an evaluation set that are one block.
_BLOCK = 16384
# Images that are hashed at once.
_BATCH = 64


class ShownImage(NamedTuple):
    """An image with what people want to know of it."""

    image_id: str
    data: bytes
    """Encoded."""
    caption: str


class Block(Protocol):
    """Images that are read together."""

    @property
    def name(self) -> str:
        """A hash of what they are: the same images have the same name."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def open(self) -> AbstractContextManager[Callable[[int], ShownImage]]:
        """What reads the image at a position, for as long as the block is open."""
        ...


@dataclass(frozen=True)
class _ShardBlock:
    """A shard of an MDS dataset, which is brought from its remote for as long as it is read."""

    name: str
    stream: VerifiedStream
    reader: Reader

    @property
    def size(self) -> int:
        return len(self.reader)

    @contextmanager
    def open(self) -> Iterator[Callable[[int], ShownImage]]:
        with self.stream.whole(self.reader):
            yield self._read

    def _read(self, position: int) -> ShownImage:
        sample = self.reader[position]
        captions = (text for name, text in sample.items() if name.startswith(CAPTION) and text)
        return ShownImage(sample[SAMPLE_ID], sample[IMAGE], next(captions, ''))


@dataclass(frozen=True)
class _Part:
    """Images of an evaluation set that follow one another."""

    name: str
    dataset: EvaluationSet
    positions: range

    @property
    def size(self) -> int:
        return len(self.positions)

    @contextmanager
    def open(self) -> Iterator[Callable[[int], ShownImage]]:
        yield self._read

    def _read(self, position: int) -> ShownImage:
        at = self.positions[position]
        return ShownImage(self.dataset.image_ids[at], self.dataset.read_image(at), self._caption(at))

    def _caption(self, at: int) -> str:
        if isinstance(self.dataset, RetrievalSet):
            return next(iter(self.dataset.captions[at]), '')
        if isinstance(self.dataset, ClassificationSet) and isinstance(label := self.dataset.labels[at], int):
            return self.dataset.classes[label]
        return ''


@dataclass(frozen=True)
class Images:
    """All images of a training dataset or of an evaluation set."""

    name: str
    """That of the dataset, or kind and name of the set: ``retrieval.flickr30k``."""
    blocks: Sequence[Block]
    fingerprint: Optional[str] = None
    """Of an evaluation set."""

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)


def dataset_images(name: str, dataset: DatasetConfig) -> Images:
    """The images of an MDS dataset, shard by shard.

    Raises:
        FileNotFoundError, FileError, ShardError: It is missing or damaged.
        ValueError: It has no images.
    """
    stream = VerifiedStream(local=dataset.local, remote=dataset.remote)
    readers = stream.open()
    stream.set_up_local(readers, np.zeros(len(readers), np.int64))
    check_columns(columns_of(readers[0]), [SAMPLE_ID, IMAGE], dataset.local)
    entries = read_index(dataset.local)['shards']
    return Images(name, [_ShardBlock(shard_fingerprint(entry), stream, reader)
                         for entry, reader in zip(entries, readers)])


def set_fingerprint(dataset: EvaluationSet) -> str:
    """Hash of which images a set has, by their ids."""
    return xxhash.xxh64(json.dumps(dataset.image_ids)).hexdigest()


def evaluation_images(config: BenchmarksConfig) -> list[Images]:
    """The images of all sets that a configuration names, those that test; errors as of the sets."""
    sets: dict[str, EvaluationSet] = {}
    for name, retrieval in config.retrieval.items():
        sets[f'retrieval.{name}'] = build_retrieval_set(retrieval.source, f'retrieval.{name}.source')
    for name, zeroshot in config.zeroshot.items():
        sets[f'zeroshot.{name}'] = build_classification_set(zeroshot.source, f'zeroshot.{name}.source')
    for name, probe in config.linear_probe.items():
        sets[f'linear_probe.{name}'] = build_classification_set(probe.test, f'linear_probe.{name}.test')
    for name, composition in config.composition.items():
        sets[f'composition.{name}'] = build_composition_set(composition.source, f'composition.{name}.source')
    return [_images_of_set(name, dataset) for name, dataset in sets.items()]


def _images_of_set(name: str, dataset: EvaluationSet) -> Images:
    blocks, ids = [], dataset.image_ids
    for start in range(0, len(ids), _BLOCK):
        positions = range(start, min(start + _BLOCK, len(ids)))
        what = json.dumps([repr(dataset.read_image), ids[start:positions.stop]])
        blocks.append(_Part(xxhash.xxh64(what).hexdigest(), dataset, positions))
    return Images(name, blocks, set_fingerprint(dataset))


# ---------------------------------------------------------------------------------------------------------------------
# Hashes
# ---------------------------------------------------------------------------------------------------------------------


class Hashes(NamedTuple):
    """Of the n images of a block."""

    ids: list[str]
    hashes: NDArray[np.uint64]
    """``(n, V, WORDS)``"""


def hash_blocks(blocks: Iterable[Block], folder: Path, num_workers: int) -> None:
    """Keep the hashes of all images in files, which those that are there already need not be read for.

    Args:
        blocks: Where the images are.
        folder: Of the files.
        num_workers: Processes, each on a block of its own; 0: this one.

    Raises:
        ValueError: An image cannot be decoded; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {path: block for block in blocks if not (path := _hash_file(folder, block)).is_file()}
    with tqdm(total=sum(block.size for block in missing.values()), desc='hash', unit=' images') as progress:
        LocalEngine(max(num_workers, 1)).run({path.name: (path, block) for path, block in missing.items()},
                                             lambda: _hash_images, progress.update)


def _hash_file(folder: Path, block: Block) -> Path:
    return folder / f'{block.name}.{KIND}.safetensors'


def _hash_images(blocks: Iterable[tuple[Path, Block]], done: Callable[[int], object]) -> None:
    """Write the hashes of blocks into files, and tell how many images each has."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # a forked process would wait for threads that are not there
    for path, block in blocks:
        ids, parts = [], []
        with block.open() as read:
            for start in range(0, block.size, _BATCH):
                images = [read(at) for at in range(start, min(start + _BATCH, block.size))]
                ids += [image.image_id for image in images]
                parts.append(image_hashes(np.stack([decode_grey(image.data, image.image_id) for image in images])))
        hashes = torch.from_numpy(np.concatenate(parts).view(np.int64))
        names = torch.frombuffer(bytearray(json.dumps(ids).encode()), dtype=torch.uint8)
        write_safetensors(path, {'hashes': hashes, 'ids': names})
        done(block.size)


def read_hashes(block: Block, folder: Path) -> Hashes:
    """What `hash_blocks` kept of a block.

    Raises:
        FileError: It is missing or damaged.
    """
    path = _hash_file(folder, block)
    tensors, _ = read_safetensors(path, 'hashes of images; remove it to compute them again')
    return Hashes(parse_json(tensors['ids'].numpy().tobytes(), path, list),
                  tensors['hashes'].numpy().view(np.uint64).reshape(-1, len(VIEWS), WORDS))


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def _feature_file(folder: Path, block: Block, model: str) -> Path:
    return folder / f'{block.name}.{model}.safetensors'


def keep_features(
    images: Sequence[Images], folder: Path, model: EvaluatedModel, batch_size: int, num_workers: int
) -> str:
    """Keep a model's features of all images in files, as `hash_blocks` does hashes.

    Returns:
        The model's name in those of files, a hash of its weights.
    """
    digest = xxhash.xxh64(model.precision)
    hash_tensors(model.model.state_dict(), digest)
    name = digest.hexdigest()
    missing = {path: block for one in images for block in one.blocks
               if not (path := _feature_file(folder, block, name)).is_file()}
    with tqdm(total=sum(block.size for block in missing.values()), desc='encode', unit=' images') as progress:
        for path, block in missing.items():
            ids, features = read_hashes(block, folder).ids, []
            with block.open() as read:
                for batch in encode_batches(model, partial(_data, read), ids, batch_size, num_workers):
                    features.append(batch.features.half())
                    progress.update(len(batch.positions))
            write_safetensors(path, {'features': torch.cat(features)})
    return name


def _data(read: Callable[[int], ShownImage], position: int) -> bytes:
    return read(position).data


def read_features(block: Block, folder: Path, model: str) -> torch.Tensor:
    """``(n, D)`` of length 1, in float16, as `keep_features` kept them under its name of the model.

    Raises:
        FileError: They are missing or damaged.
    """
    return read_safetensors(_feature_file(folder, block, model),
                            'features of images; remove it to compute them again').tensors['features']
