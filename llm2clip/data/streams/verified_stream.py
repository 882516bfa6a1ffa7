# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stream that verifies shards by their index, and raises an error that names a damaged one.

Streaming checks hashes only on request, after a file has its final name, and never for files of earlier runs.
Here a file gets its final name after verification, and `SafeDataset` verifies existing files at first use.
"""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.constant import TICK
from streaming.base.format import reader_from_json
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.util import wait_for_file_to_exist
from streaming.base.world import World

from llm2clip.data.schema import INDEX, SAMPLE_ID, columns_of, dataset_fingerprint, file_damage, read_index
from llm2clip.errors import FileError
from llm2clip.io.files import json_damage
from llm2clip.io.remotes import download

log = logging.getLogger(__name__)


class ShardError(RuntimeError):
    """Dataset file that is missing, damaged or cannot be downloaded; the message names file and remote."""


class VerifiedStream(Stream):
    """Stream of shards with one file each, verified by size and hash.

    A download is tried up to `download_retry` times, with growing pauses.  Each attempt may take
    `download_timeout` seconds.  A file that cannot be obtained, or a remote index that differs from the
    cached one, raises a ShardError.

    Args:
        columns: Columns that the dataset must have besides the id, with the errors of `read_columns`.
        **kwargs: Passed to ``Stream``.

    Attributes:
        datasets: The MDS datasets that the stream reads, each as a stream.
    """

    def __init__(self, columns: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = columns
        self.datasets = [self]

    def open(self, download_retry: int = 5, download_timeout: float = 120.0) -> Any:
        """Return the readers of all shards, for use without a dataset."""
        self.apply_default({
            'split': None, 'download_retry': download_retry, 'download_timeout': download_timeout,
            'validate_hash': None, 'keep_zip': False})
        return self.get_shards(World.detect(), False)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Return the readers of the index, which a node's first process downloads or compares."""
        path = self._path(INDEX)
        if self.remote is not None:
            if not world.is_local_leader:
                message = (f'{self._source(INDEX)} did not come to {path} within '
                           f'{self.download_timeout:.0f} s (download_timeout)')
                wait_for_file_to_exist(str(path), TICK, self.download_timeout, message)
            else:
                self._fetch_index(path)
        index = read_index(path.parent)
        self.content = dataset_fingerprint(index)
        # All shards of an index have the same columns.
        first = reader_from_json(self.local, self.split, index['shards'][0])
        columns_of(first, [SAMPLE_ID, *self.columns], self.local)
        shards: list[Reader] = []
        for shard in index['shards']:
            reader: Any = copy.copy(first)  # `reader_from_json` takes ten times as long
            reader.samples = shard['samples']
            reader.raw_data = FileInfo(**shard['raw_data'])
            reader.file_pairs = [(reader.raw_data, None)]
            shards.append(reader)
        return shards

    def _fetch_index(self, path: Path) -> None:
        """Download the index, or compare it with the local one; remove downloads of killed processes."""
        for left in [*path.parent.glob('.*.part'), *path.parent.glob(f'{INDEX}.*.now')]:
            if _is_running(left.name.split('.')[-2]):
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        if not path.is_file():
            self.download(INDEX)
            return
        current = self.download(INDEX, to=f'{INDEX}.{os.getpid()}.now')
        is_same = current.read_bytes() == path.read_bytes()
        current.unlink()
        if not is_same:
            raise ShardError(f'{self._source(INDEX)} is not the index that {self.local} was filled with: the '
                             f'dataset was written anew; remove {self.local}')

    def set_up_local(self, shards: Sequence[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Count the files with the right size as present; without a remote, all files must be present."""
        for k, shard in enumerate(shards):
            path, info = self._file(shard)
            size = path.stat().st_size if path.is_file() else 0
            if size != info.bytes:
                if size:
                    self._discard(path, f'{size} bytes, expected {info.bytes}')
                elif self.remote is None:
                    raise ShardError(f'shard {path} is missing')
                size = 0
            cache_usage_per_shard[k] = size

    def prepare_shard(self, shard: Reader) -> int:
        """Download a shard that is not local, and return the number of bytes downloaded."""
        path, info = self._file(shard)
        if path.is_file():
            return 0
        self.download(info.basename, partial(file_damage, expected=info))
        return info.bytes

    def is_local(self, shard: Reader) -> bool:
        """Return whether all files of a shard are local."""
        return self._file(shard)[0].is_file()

    @contextmanager
    def whole(self, shard: Reader) -> Iterator[Reader]:
        """Provide a verified shard to the block, and remove it afterwards if it was not local before."""
        was_local = self.is_local(shard)
        self.discard_damaged(shard)
        self.prepare_shard(shard)
        yield shard
        if not was_local:
            shard.evict()

    def discard_damaged(self, shard: Reader) -> int:
        """Remove the shard's local file if it is damaged, so that it is downloaded again, and return its
        expected size.  Return 0 if nothing was removed; raise a ShardError if there is no remote."""
        path, info = self._file(shard)
        try:
            damage = file_damage(path, info)
        except FileError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return 0  # not downloaded yet, or evicted by another process
        if damage is None:
            return 0
        self._discard(path, damage)
        return info.bytes

    def _discard(self, path: Path, damage: str) -> None:
        if self.remote is None:
            raise ShardError(f'shard {path} is damaged: {damage}')
        log.warning(f'{path} is damaged ({damage}) and is downloaded again')
        path.unlink(missing_ok=True)

    def _file(self, shard: Reader) -> tuple[Path, FileInfo]:
        info, _ = shard.file_pairs[0]
        return self._path(info.basename), info

    def _path(self, basename: str) -> Path:
        return Path(self.local, self.split, basename)

    def _source(self, basename: str) -> str:
        return os.path.join(self.remote or self.local, self.split, basename)

    def download(
        self, basename: str, find_damage: Callable[[Path], Optional[str]] = json_damage,
        to: Optional[str] = None,
    ) -> Path:
        """Download a file from the remote, and return its local path.

        Args:
            basename: File name in the remote.
            find_damage: Function that returns what is wrong with a downloaded file, or None.
            to: Local file name, if it differs.

        Raises:
            ShardError: The file is not there, cannot be downloaded or is damaged.
            ConfigError: There are no credentials for the remote.
            FileError: The disk is full.
        """
        url = self._source(basename)
        path = self._path(to or basename)
        work = self._path(f'.{(to or basename).replace(os.sep, "_")}.{os.getpid()}.part')
        try:
            is_there = download(url, path, find_damage, self.download_retry, self.download_timeout, work)
        except OSError as error:
            raise ShardError(str(error)) from error
        if not is_there:
            raise ShardError(f'{url} does not exist')
        return path


def _is_running(process: str) -> bool:
    """Whether a process runs; a container without init keeps killed ones as zombies."""
    try:
        status = Path('/proc', process, 'status').read_text()
    except OSError:
        return False
    return '\nState:\tZ' not in status
