# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A StreamingDataset that either delivers every sample of an epoch or stops with an error that says why.

In Streaming, an exception of a download thread ends the epoch early and silently in its own process, and lets the other
workers and ranks wait for ever.  Here all processes of a node see the failure and raise it.

Of StreamingDataset in Streaming 0.13 this relies on:

- `_event`: an epoch uses the one that it finds, and all its parts end when it is set;
- `_iterator`: the progress of an epoch, which waits for the `on_exit` of its threads before the next epoch begins;
- `_ready_thread`: moves `ready_index` behind the last sample that is there, up to which samples are delivered;
- `_each_sample_id`: the ids of the samples that are delivered, after those of an epoch have been drawn;
- `_shard_states`: what every process knows of a shard, in the values of `_ShardState`;
- `_cache_filelock`: held by `prepare_shard` while it makes room;
- `_shm_prefix_int`: the number with which the names of a dataset in shared memory begin, as six digits;
- `_unpack_locals`: reads the folders that a dataset uses from its name in shared memory that ends in ``_locals``.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.constant import LOCALS, TICK
from streaming.base.dataset import _ShardState
from streaming.base.shared import SharedArray
from streaming.base.shared.prefix import _unpack_locals

from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream

__all__ = ['SafeDataset']

_LOCK_FILE = '.in_use'
_LOCK_SECONDS = 30.0


class _Failure:
    """Why the dataset stopped, seen by every process of the node; it takes the place of Streaming's event."""

    def __init__(self, name: str) -> None:
        self._text = SharedArray(4096, np.uint8, name)

    def clear(self) -> None:
        self._text[:] = 0

    def is_set(self) -> bool:
        return bool(self._text[0])

    def set(self, message: Optional[str] = None) -> None:
        """Keep the first message.  Streaming's own calls have none, and are followed by an error that has one."""
        if message and not self.is_set():
            data = np.frombuffer(message.encode()[:4095], np.uint8)
            self._text[1:len(data)] = data[1:]
            self._text[0] = data[0]

    def __str__(self) -> str:
        return bytes(self._text[:]).rstrip(b'\0').decode(errors='replace')


class SafeDataset(StreamingDataset):
    """A StreamingDataset of VerifiedStreams.

    Args:
        streams: The streams.
        **kwargs: Passed to StreamingDataset.

    Raises:
        ShardError: On construction or while iterating, on every process of the node: a shard cannot be had as its
            index describes it, `cache_limit` cannot work, or another run uses the cache.
    """

    def __init__(self, streams: Sequence[VerifiedStream], **kwargs: Any) -> None:
        self._cache_locks = _claim_caches(folder for stream in streams for folder in stream.caches())
        super().__init__(streams=streams, **kwargs)
        names = [f'{self._shm_prefix_int:06}_{name}' for name in ('failure', 'unchecked')]
        if dist.get_local_rank() == 0:
            # Streaming does not know of them, and leaves those of a killed run, which may be smaller.
            for name in names:
                Path('/dev/shm', name).unlink(missing_ok=True)
        dist.barrier()
        self._failure = _Failure(names[0])
        self._event = self._failure  # pyright: ignore[reportAttributeAccessIssue]
        # Files that were there before are checked at first use, once per node.
        self._unchecked = SharedArray(self.num_shards, np.uint8, names[1])
        if dist.get_local_rank() == 0:
            self._failure.clear()
            self._unchecked[:] = self._shard_states.numpy() == _ShardState.LOCAL
        dist.barrier()

    # ------------------------------------------------------------------------------------------------- one shard
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            shard = self._stream(shard_id).source(self.shards[shard_id].file_pairs[0][0].basename)
            self._failure.set(str(error) if isinstance(error, ShardError) else
                              f'shard {shard}: {type(error).__name__}: {error}')
            # Others may wait for this shard, or for the lock that Streaming does not release when eviction fails.
            self._shard_states[shard_id] = _ShardState.REMOTE
            if self._cache_filelock.is_locked:
                self._cache_filelock.release()
            raise

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        try:
            self._check_at_first_use(int(self.spanner[sample_id][0]))
            return super().get_item(sample_id, retry)
        except Exception as error:
            if self._failure.is_set():  # also another process's failure, of which Streaming says only that there is one
                raise ShardError(str(self._failure)) from error
            self._failure.set(str(error))
            raise

    def _check_at_first_use(self, shard_id: int) -> None:
        if not self._unchecked[shard_id] or self._shard_states[shard_id] != _ShardState.LOCAL:
            return
        if removed := self._stream(shard_id).discard_damaged(self.shards[shard_id]):
            self.cache_usage -= removed
            self._shard_states[shard_id] = _ShardState.REMOTE
        self._unchecked[shard_id] = 0

    def _stream(self, shard_id: int) -> VerifiedStream:
        stream = self.streams[self.stream_per_shard[shard_id]]
        assert isinstance(stream, VerifiedStream)
        return stream

    # ------------------------------------------------------------------------------------------------- one epoch
    def on_exception(self, future: Future) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failure.set(f'{type(error).__name__}: {error}')
            self._iterator.on_exit()  # which the thread did not come to, and for which the next epoch would wait

    def _ready_thread(self, it: Any) -> None:
        """As Streaming's, but a shard that was evicted again before it was used is downloaded again."""
        while not (it.should_exit() or it.ready_index == it.total or self._failure.is_set()):
            if self.predownload is not None and self.predownload < it.ready_index - it.yield_index:
                time.sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            if sample_id != -1:
                shard_id, _ = self.spanner[sample_id]
                while self._shard_states[shard_id] != _ShardState.LOCAL and not self._failure.is_set():
                    if self._shard_states[shard_id] == _ShardState.REMOTE:
                        self.prepare_shard(shard_id, False)
                    else:
                        time.sleep(TICK)
            it.ready_index += 1
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        delivered, expected = 0, int((it.sample_ids != -1).sum())
        for sample_id in super()._each_sample_id(it):
            yield sample_id
            delivered += 1
        if self._failure.is_set():
            raise ShardError(str(self._failure))
        if delivered != expected:
            raise ShardError(f'the epoch ended after {delivered} of the {expected} samples of this worker')


def _claim_caches(folders: Iterable[str]) -> list[BinaryIO]:
    """Lock caches for this process and its children, and forget killed runs that used them.

    Streaming registers the folders that a dataset uses in shared memory, and refuses a cache that is registered.
    Shared memory outlives a killed run, a file lock does not.

    Returns:
        The locks, which hold while they are open; only the first rank of a node has any.

    Raises:
        ShardError: Another run uses one of the folders.
    """
    locks: list[BinaryIO] = []
    if dist.get_local_rank() == 0:
        caches = set(folders)
        for folder in sorted(caches):
            os.makedirs(folder, exist_ok=True)
            lock = open(os.path.join(folder, _LOCK_FILE), 'wb')  # noqa: SIM115
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ShardError(f'{folder} is the cache of another run that is still alive') from None
                time.sleep(0.2)
            locks.append(lock)
        for registered in Path('/dev/shm').glob(f'[0-9]*_{LOCALS}'):
            if caches.intersection(_unpack_locals(registered.read_bytes())[0]):
                for segment in registered.parent.glob(f'{registered.name.partition("_")[0]}_*'):
                    segment.unlink(missing_ok=True)
    dist.barrier()
    return locks
