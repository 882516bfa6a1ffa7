# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The shards of a dataset in a few arrays, and a reader of one when it is asked for.

A dataset of a billion samples has 200,000 shards, and a node 64 processes that know all of them.  Readers of so many
and of a sidecar's took 0.9 GB, which the processes of a node do not share for long, since Python's garbage collector
writes into every object that it visits.  The arrays take 60 MB, and stay shared.
"""

import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Optional, Union

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.format.mds.reader import MDSReader

__all__ = ['AllShards', 'LazyShards', 'ShardOfSample', 'ShardTable']

# More than a worker has in use at a time.
_READERS = 4096


class LazyShards(Sequence[Reader]):
    """Shards of one stream, whose readers are made when they are asked for.

    Attributes:
        samples: Of each shard.
    """

    samples: NDArray[np.int64]

    def __init__(self) -> None:
        self._cached = lru_cache(maxsize=_READERS)(self.make)

    @abstractmethod
    def make(self, i: int) -> Reader:
        """A reader of shard `i`."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self.make(k) for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f'shard {i} of {len(self)}')
        return self._cached(int(i) % len(self))

    def __iter__(self) -> Iterator[Reader]:
        return map(self.make, range(len(self)))


class _Files:
    """Names, sizes and hashes of files."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._hashes: list[str] = []

    def add(self, info: Optional[Mapping[str, Any]]) -> None:
        self._names.append(info['basename'] if info else '')
        self._sizes.append(info['bytes'] if info else 0)
        self._hashes.append(json.dumps(info['hashes']) if info else '')

    def pack(self) -> None:
        """There will be no more."""
        self._packed = [np.array([text.encode() for text in texts], 'S') for texts in (self._names, self._hashes)]
        self.sizes = np.array(self._sizes, np.int64)
        del self._names, self._sizes, self._hashes

    def among(self, names: set[str]) -> NDArray[np.bool_]:
        """Which of the files have one of some names."""
        return np.isin(self._packed[0], np.array([os.fsencode(name) for name in names], 'S'))

    def __getitem__(self, i: int) -> Optional[FileInfo]:
        name, hashes = (texts[i].decode() for texts in self._packed)
        return FileInfo(name, int(self.sizes[i]), json.loads(hashes)) if name else None


class ShardTable(LazyShards):
    """The shards of one MDS dataset, which all have the same columns.

    Args:
        local: Folder of the dataset.
        split: Folder in it.
        shards: Entries of its index, which have been checked.
    """

    def __init__(self, local: str, split: Optional[str], shards: Iterable[Mapping[str, Any]]) -> None:
        super().__init__()
        self._folder, self._split = local, split
        self._raw, self._zip = _Files(), _Files()
        samples, self._rest, known = [], [], {}
        for shard in shards:
            samples.append(shard['samples'])
            self._raw.add(shard['raw_data'])
            self._zip.add(shard['zip_data'])
            # The same for nearly all, and kept once.
            rest = shard['compression'], tuple(shard['hashes']), shard['size_limit']
            self._rest.append(known.setdefault(rest, rest))
            self._columns = tuple(shard[f'column_{what}'] for what in ('encodings', 'names', 'sizes'))
        self.samples = np.array(samples, np.int64)
        self._raw.pack()
        self._zip.pack()

    @property
    def raw_bytes(self) -> NDArray[np.int64]:
        """Size of each shard, decompressed."""
        return self._raw.sizes

    def having(self, names: set[str]) -> NDArray[np.int64]:
        """The shards of which a file has one of some names."""
        return np.flatnonzero(self._raw.among(names) | self._zip.among(names))

    def make(self, i: int) -> MDSReader:
        compression, hashes, size_limit = self._rest[i]
        raw = self._raw[i]
        assert raw is not None
        encodings, names, sizes = self._columns
        return MDSReader(self._folder, self._split, encodings, names, sizes, compression, list(hashes), raw,
                         int(self.samples[i]), size_limit, self._zip[i])


class AllShards:
    """The shards of several streams, to which Streaming adds those of one after the other."""

    def __init__(self) -> None:
        self._streams: list[LazyShards] = []
        self._ends = np.zeros(0, np.int64)

    def __iadd__(self, shards: LazyShards) -> 'AllShards':
        self._streams.append(shards)
        self._ends = np.cumsum([len(stream) for stream in self._streams])
        return self

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: Union[int, slice, np.int64]) -> Any:
        """A shard, or all of a stream by the slice that is theirs."""
        if isinstance(i, slice):
            stream = int(np.searchsorted(self._ends, i.stop))
            assert self._ends[stream] == i.stop and i.stop - i.start == len(self._streams[stream])
            return self._streams[stream]
        stream = int(np.searchsorted(self._ends, i, 'right'))
        return self._streams[stream][int(i) - int(self._ends[stream - 1] if stream else 0)]

    def __iter__(self) -> Iterator[Reader]:
        for stream in self._streams:
            yield from stream


class ShardOfSample:
    """Streaming's `Spanner`, which takes 8 bytes for each sample while it is made, by a binary search.

    Args:
        sizes: Samples of each shard.
    """

    def __init__(self, sizes: NDArray[np.int64]) -> None:
        self._ends = sizes.cumsum()

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Shard and place in it."""
        if not 0 <= sample < self._ends[-1]:
            raise IndexError(f'sample {sample} of {self._ends[-1]}')
        shard = int(self._ends.searchsorted(sample, 'right'))
        return shard, int(sample) - int(self._ends[shard - 1] if shard else 0)
