# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image dataset and sidecars of embeddings, MDS datasets of the same samples read as one stream.

Samples are read here and not by Streaming's reader, which decodes all columns of a sample: of an image's captions, one
is used.  Of Streaming 0.13 this relies on nothing private, but on the format of MDS files, version 2.
"""

import functools
import io
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from streaming.base.format.base.reader import Reader
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.world import World

from llm2clip.data.schema import IMAGE, SAMPLE_ID, TEACHER_FILE, check_columns, first_shards, read_index
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.files import read_json

__all__ = ['PairedReader', 'PairedSidecars', 'PairedStream', 'columns_of']


def columns_of(reader: Reader) -> dict[str, str]:
    """Column name -> MDS type of one shard."""
    assert isinstance(reader, MDSReader)
    return dict(zip(reader.column_names, reader.column_encodings))


@functools.cache
def _dtype(encoding: str) -> Optional[torch.dtype]:
    """Of the columns that hold vectors and their scales; None for text and images."""
    kind = encoding.split(':')[1] if encoding.startswith('ndarray:') else encoding
    return getattr(torch, kind) if kind in ('float16', 'int8', 'float32') else None


def _open(reader: MDSReader) -> io.FileIO:
    return io.FileIO(os.path.join(reader.dirname, reader.split, reader.raw_data.basename))


_kept_open = functools.lru_cache(maxsize=64)(_open)


class PairedRow(Mapping[str, Any]):
    """A sample whose columns are decoded when they are asked for: of its captions, one is used.

    Vectors are tensors that share the sample's memory, scales are tensors without dimension.

    Attributes:
        sidecars: The sample's rows of the sidecars, in their order.
    """

    def __init__(self, reader: Reader, idx: int, keep_open: bool, sidecars: Sequence[Reader] = ()) -> None:
        assert isinstance(reader, MDSReader)
        self.sidecars = [PairedRow(sidecar, idx, keep_open) for sidecar in sidecars]
        file = _kept_open(reader) if keep_open else _open(reader)
        begin, end = struct.unpack('<2I', os.pread(file.fileno(), 8, 4 + 4 * idx))
        self._reader, self._data = reader, bytearray(end - begin)
        if os.preadv(file.fileno(), [self._data], begin) != end - begin:
            raise ValueError(f'sample {idx} of {file.name} is cut')
        # Before the columns stand the sizes of those that have no fixed one.
        sizes, at = [size or 0 for size in reader.column_sizes], 0
        for i, size in enumerate(sizes):
            if not size:
                sizes[i], = struct.unpack_from('<I', self._data, at)
                at += 4
        self._ends = list(itertools.accumulate(sizes, initial=at))

    def stored(self, name: str) -> bytearray:
        """A column as it lies in the shard."""
        i = self._reader.column_names.index(name)
        return self._data[self._ends[i]:self._ends[i + 1]]

    def __getitem__(self, name: str) -> Any:
        i = self._reader.column_names.index(name)
        encoding, start, end = self._reader.column_encodings[i], self._ends[i], self._ends[i + 1]
        if (dtype := _dtype(encoding)) is None:
            return mds_decode(encoding, self._data[start:end])  # pyright: ignore[reportArgumentType]
        values = torch.frombuffer(self._data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start)
        return values if encoding.startswith('ndarray:') else values[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.column_names)

    def __len__(self) -> int:
        return len(self._reader.column_names)


class PairedReader(Reader):
    """One shard of each dataset, sample by sample the same."""

    def __init__(self, images: Reader, sidecars: Sequence[Reader], keep_open: bool) -> None:
        super().__init__(images.dirname, images.split, images.compression, images.hashes, images.samples, None)
        self.images = images
        self.sidecars = sidecars
        self.keep_open = keep_open
        self.file_pairs = [pair for reader in (images, *sidecars) for pair in reader.file_pairs]

    def evict(self) -> int:
        return sum(reader.evict() for reader in (self.images, *self.sidecars))

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        raise TypeError('a paired shard has no bytes of its own')

    def get_sample_data(self, idx: int) -> bytes:
        raise TypeError('a paired shard has no bytes of its own')

    def get_item(self, idx: int) -> PairedRow:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = PairedRow(self.images, idx, self.keep_open, self.sidecars)
        for sidecar, row in zip(self.sidecars, sample.sidecars):
            if sample.stored(SAMPLE_ID) != row.stored(SAMPLE_ID):
                raise ValueError(
                    f'sample {idx} of {self.images.file_pairs[0][0].basename} is {sample[SAMPLE_ID]!r} in '
                    f'{self.images.dirname} but {row[SAMPLE_ID]!r} in the sidecar {sidecar.dirname}')
        return sample


class PairedStream(VerifiedStream):
    """A stream of image samples with their rows of the sidecars, which hold the captions' embeddings.

    Every dataset keeps its own remote and cache.  Shard k of a sidecar must hold the samples of shard k of the images,
    in order, which is how `extract_embeddings` writes it; every sample's id is checked when it is read.

    Args:
        local: Folder or cache of the image dataset.
        sidecars: Folders or caches of sidecars, and where they come from (or None).
        remote: Where the image dataset comes from.
        columns: Image-dataset columns that must exist.
        embedding_columns: Columns that every sidecar must have.
        keep_open: Keep the files of the shards last read open, which saves time; not where shards are evicted, since
            a file that is open still takes its space.
        **kwargs: Passed to VerifiedStream, and in part to the sidecars'.

    Raises:
        FileNotFoundError: A dataset is missing.
        ValueError: A column is missing or of another type, or a sidecar belongs to another dataset.
    """

    def __init__(
        self,
        local: str,
        sidecars: Sequence[tuple[str, Optional[str]]],
        remote: Optional[str] = None,
        columns: Sequence[str] = (),
        embedding_columns: Sequence[str] = (),
        keep_open: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(local=local, remote=remote, **kwargs)
        shared = {k: v for k, v in kwargs.items() if k not in ('proportion', 'repeat', 'choose')}
        self.sidecars = [VerifiedStream(local=folder, remote=source, **shared) for folder, source in sidecars]
        self._columns = (SAMPLE_ID, IMAGE, *columns)
        self._embedding_columns = (SAMPLE_ID, *embedding_columns)
        self.keep_open = keep_open

    def caches(self) -> list[str]:
        return super().caches() + [cache for sidecar in self.sidecars for cache in sidecar.caches()]

    def apply_default(self, default: dict[str, Any]) -> None:
        super().apply_default(default)
        for sidecar in self.sidecars:
            sidecar.apply_default(default)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        images = super().get_shards(world, allow_unsafe_types)
        # All shards of an index have the same columns.
        check_columns(columns_of(images[0]), self._columns, self.local)
        sidecars = []
        for sidecar in self.sidecars:
            where = f'sidecar {sidecar.local}'
            shards = sidecar.get_shards(world, allow_unsafe_types)
            check_columns(columns_of(shards[0]), self._embedding_columns, where)
            found, expected = recorded_dataset(sidecar), self._dataset()
            belongs = f'{where} belongs to another dataset than {self.local}'
            if len(shards) < len(images) and first_shards(read_index(Path(self.local, self.split)), found) is not None:
                raise ValueError(f'{where} has vectors for {len(shards)} of the {len(images)} shards of {self.local}, '
                                 'which has grown since they were extracted; extract_embeddings, called again with the '
                                 'same `out`, adds those of the others')
            if len(images) != len(shards):
                raise ValueError(f'{belongs}: it has {len(shards)} shards, expected {len(images)}')
            for k, (image, row) in enumerate(zip(images, shards)):
                if len(image) != len(row):
                    raise ValueError(f'{belongs}: its shard {k} holds {len(row)} samples, expected {len(image)}')
            if found != expected:
                raise ValueError(f'{belongs}: it was made for content {found}, expected {expected}')
            sidecars.append(shards)
        return [PairedReader(image, rows, self.keep_open) for image, *rows in zip(images, *sidecars)]

    def _dataset(self) -> Optional[str]:
        """Content of the dataset that the sidecars must be made for."""
        return self.content

    def _parts(self, shard: Reader) -> list[tuple[VerifiedStream, Reader]]:
        """The sidecars with their readers of one shard."""
        assert isinstance(shard, PairedReader)
        return list(zip(self.sidecars, shard.sidecars))

    def set_up_local(self, shards: Sequence[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        # A shard counts as present when all its files are there in the same form; otherwise preparing it completes
        # it. Nothing is deleted here, since without a remote these files are the user's only copy.
        whole = np.ones(len(shards), bool)
        usage = np.zeros_like(cache_usage_per_shard)
        parts = [[shard.images, *shard.sidecars] for shard in shards if isinstance(shard, PairedReader)]
        for stream, of_stream in zip((super(), *self.sidecars), map(list, zip(*parts))):
            sizes = np.zeros_like(usage)
            stream.set_up_local(of_stream, sizes)
            usage += sizes
            whole &= sizes == [shard.get_raw_size() for shard in of_stream]
        cache_usage_per_shard[:] = np.where(whole, usage, 0)

    def prepare_shard(self, shard: PairedReader) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().prepare_shard(shard.images) + sum(
            sidecar.prepare_shard(reader) for sidecar, reader in self._parts(shard))

    def discard_damaged(self, shard: Reader) -> int:
        assert isinstance(shard, PairedReader)
        return super().discard_damaged(shard.images) + sum(
            sidecar.discard_damaged(reader) for sidecar, reader in self._parts(shard))

    def get_index_size(self) -> int:
        return super().get_index_size() + sum(sidecar.get_index_size() for sidecar in self.sidecars)


class PairedSidecars(PairedStream):
    """Samples of one sidecar with their rows of others of the same dataset, of which neither images nor texts are read.

    Args:
        local: Folder or cache of the first sidecar.
        sidecars: Folders or caches of the others, and where they come from (or None).
        remote: Where the first comes from.
        embedding_columns: Columns that every sidecar must have.
        **kwargs: Passed to PairedStream, which says what is raised.
    """

    def __init__(
        self, local: str, sidecars: Sequence[tuple[str, Optional[str]]], remote: Optional[str] = None,
        embedding_columns: Sequence[str] = (), **kwargs: Any,
    ) -> None:
        super().__init__(local, sidecars, remote, embedding_columns=embedding_columns, **kwargs)
        self._columns = (SAMPLE_ID, *embedding_columns)

    def _dataset(self) -> Optional[str]:
        return recorded_dataset(self)


def recorded_dataset(sidecar: VerifiedStream) -> Optional[str]:
    """The content of the dataset that a sidecar was made for.

    Raises:
        FileNotFoundError: There is no sidecar.
    """
    path = Path(sidecar.local, sidecar.split, TEACHER_FILE)
    if sidecar.remote and not path.is_file():
        sidecar.download(TEACHER_FILE)
    if not path.is_file():
        raise FileNotFoundError(f'there is no sidecar in {path.parent}: {path} does not exist')
    return read_json(path, dict).get('dataset')
