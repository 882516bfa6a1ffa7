# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stream that reads an image dataset together with embeddings datasets of the same samples."""

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.base.reader import Reader
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.world import World

from llm2clip.config import DatasetConfig
from llm2clip.data.schema import EMBEDDING, SAMPLE_ID, TEACHER_FILE, columns_of
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.io.files import read_json


class PairedRow(Mapping[str, Any]):
    """Sample with lazily decoded columns, since training uses only some of its captions.

    Attributes:
        text_embeddings: The sample's rows of the embeddings datasets, in their order.
    """

    def __init__(self, reader: MDSReader, idx: int, text_embeddings: Sequence[MDSReader] = ()) -> None:
        self.text_embeddings = [PairedRow(embeddings, idx) for embeddings in text_embeddings]
        self._reader = reader
        self._data = bytearray(reader.get_sample_data(idx))
        # The sizes of variable-size columns precede the columns.
        offset = 0
        sizes: list[int] = []
        for size in reader.column_sizes:
            if not size:
                size, = struct.unpack_from('<I', self._data, offset)
                offset += 4
            sizes.append(size)
        self._ends = list(itertools.accumulate(sizes, initial=offset))

    def __getitem__(self, name: str) -> Any:
        i = self._reader.column_names.index(name)
        # A copy in a bytearray, since tensors of its arrays have to be writable.
        data = self._data[slice(*self._ends[i:i + 2])]
        return mds_decode(self._reader.column_encodings[i], data)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.column_names)

    def __len__(self) -> int:
        return len(self._reader.column_names)


class PairedReader(Reader):
    """Reader of one shard of each dataset, with the same samples in the same order."""

    def __init__(self, images: MDSReader, text_embeddings: Sequence[MDSReader]) -> None:
        super().__init__(
            images.dirname, images.split, images.compression, images.hashes, images.samples, size_limit=None)
        self.images = images
        self.text_embeddings = text_embeddings
        self.readers = [images, *text_embeddings]
        self.file_pairs = list(itertools.chain.from_iterable(reader.file_pairs for reader in self.readers))

    def evict(self) -> int:
        return sum(reader.evict() for reader in self.readers)

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        raise TypeError('a paired shard has no bytes of its own')

    def get_sample_data(self, idx: int) -> bytes:
        raise TypeError('a paired shard has no bytes of its own')

    def get_item(self, idx: int) -> PairedRow:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = PairedRow(self.images, idx, self.text_embeddings)
        for embeddings, row in zip(self.text_embeddings, sample.text_embeddings):
            if sample[SAMPLE_ID] != row[SAMPLE_ID]:
                raise ValueError(
                    f'sample {idx} of {self.images.file_pairs[0][0].basename} is {sample[SAMPLE_ID]!r} in '
                    f'{self.images.dirname} but {row[SAMPLE_ID]!r} in the embeddings dataset '
                    f'{embeddings.dirname}')
        return sample


class PairedStream(VerifiedStream):
    """Stream of an image dataset with its embeddings datasets, or of one embeddings dataset with others.

    Every dataset keeps its own remote and cache.  Shard k of an embeddings dataset must hold the samples of
    shard k of the first dataset, in order, as `extract_embeddings` writes it.  Sample ids are compared on
    each read.  All embeddings must have been extracted from the content of the image dataset, or of `source`.

    Args:
        local: Folder or cache of the image dataset, or of the first embeddings dataset.
        text_embeddings: The (other) embeddings datasets.
        remote: Remote of the first dataset.
        columns: Columns that the first dataset must have.  If these are vectors, it is an embeddings dataset.
        embedding_columns: Columns that every other embeddings dataset must have.
        source: Dataset that the embeddings were extracted from, of which only the index is read.
        **weights: ``proportion`` and ``repeat``, passed to ``Stream``.

    Attributes:
        datasets: The first dataset and the (other) embeddings datasets, each as a stream.
        encodings: MDS type of the first required column of each, ``ndarray:float16:768`` for vectors, once
            the shards have been opened.

    Raises:
        FileError, ValueError: A dataset or column is missing, or embeddings belong to other images.
    """

    def __init__(
        self, local: str, text_embeddings: Iterable[DatasetConfig], columns: Sequence[str],
        embedding_columns: Sequence[str], remote: Optional[str] = None,
        source: Optional[DatasetConfig] = None, **weights: Any,
    ) -> None:
        super().__init__(local=local, remote=remote, **weights)
        self.text_embeddings = [
            VerifiedStream(local=dataset.local, remote=dataset.remote, columns=embedding_columns)
            for dataset in text_embeddings]
        self.datasets = [VerifiedStream(local=local, remote=remote, columns=columns), *self.text_embeddings]
        self.compared = list(self.datasets)
        if source is not None:
            dataset = VerifiedStream(local=source.local, remote=source.remote, columns=[SAMPLE_ID])
            self.compared.insert(0, dataset)
        self.encodings: list[str] = []

    def apply_default(self, default: dict[str, Any]) -> None:
        super().apply_default(default)
        for dataset in self.compared:
            dataset.apply_default(default)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        shards: list[list[Any]] = [dataset.get_shards(world, allow_unsafe_types) for dataset in self.compared]
        encodings: list[str] = []
        descriptions: list[str] = []
        for dataset, readers in zip(self.compared, shards):
            encodings.append(columns_of(readers[0])[dataset.columns[0]])
            content = dataset.content
            if dataset.columns[0].startswith(EMBEDDING):  # of the dataset that it was extracted from
                path = Path(dataset.local, dataset.split, TEACHER_FILE)
                if not path.is_file():
                    dataset.download(TEACHER_FILE)
                content = read_json(path, dict).get('dataset')
            num_samples = sum(map(len, readers))
            descriptions.append(f'{num_samples:,} samples in {len(readers):,} shards of content {content}')
            if descriptions[-1] != descriptions[0]:
                raise ValueError(f'embeddings dataset {dataset.local} belongs to another dataset than '
                                 f'{self.compared[0].local}: it has {descriptions[-1]}, expected '
                                 f'{descriptions[0]}, shard by shard')
        self.content = self.datasets[0].content
        first = len(self.compared) - len(self.datasets)  # after the source
        self.encodings = encodings[first:]
        return [PairedReader(images, text_embeddings) for images, *text_embeddings in zip(*shards[first:])]

    def set_up_local(self, shards: Sequence[Any], cache_usage_per_shard: NDArray[np.int64]) -> None:
        # Count all files, since they can be evicted; `SafeDataset` finds the shards that lack one.
        for k, dataset in enumerate(self.datasets):
            sizes = np.zeros(len(shards), np.int64)
            dataset.set_up_local([shard.readers[k] for shard in shards], sizes)
            cache_usage_per_shard += sizes

    def prepare_shard(self, shard: Any) -> int:
        return sum(dataset.prepare_shard(reader) for dataset, reader in zip(self.datasets, shard.readers))

    def is_local(self, shard: Any) -> bool:
        return all(dataset.is_local(reader) for dataset, reader in zip(self.datasets, shard.readers))

    def discard_damaged(self, shard: Any) -> int:
        return sum(dataset.discard_damaged(reader) for dataset, reader in zip(self.datasets, shard.readers))

    def get_index_size(self) -> int:
        return sum(dataset.get_index_size() for dataset in self.datasets)


def are_stored_alike(streams: Iterable[PairedStream]) -> bool:
    """Return whether each stream has one embeddings dataset, and all of these have the same storage type."""
    encodings = {tuple(stream.encodings[1:]) for stream in streams}
    return len(encodings) == 1 and len(encodings.pop()) == 1
