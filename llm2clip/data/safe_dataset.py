# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A StreamingDataset that either delivers every sample of an epoch or stops with an error that says why.

In Streaming, an exception of a download thread ends the epoch early and silently in its own process, and lets the other
workers and ranks wait for ever.  Here all processes of a node see the failure and raise it.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.constant import LOCALS, TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.shared import SharedArray
from streaming.base.shared.prefix import _get_path, _unpack_locals

from llm2clip.data.verified_stream import ShardError, VerifiedStream

__all__ = ['SafeDataset']

_LOCK_FILE = '.in_use'
_LOCK_SECONDS = 30.0


class _Failure:
    """Why the dataset stopped, seen by every process of the node; it takes the place of Streaming's `Event`."""

    def __init__(self, name: str) -> None:
        self._text = SharedArray(4096, np.uint8, name)

    def clear(self) -> None:
        self._text[:] = 0

    def is_set(self) -> bool:
        return bool(self._text[0])

    def set(self, message: str = 'the dataset was stopped') -> None:
        if not self.is_set():
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
        self._cache_locks = _claim_caches(streams)
        super().__init__(streams=streams, **kwargs)
        self._failure = _Failure(_get_path(self._shm_prefix_int, 'failure'))
        self._event = self._failure  # pyright: ignore[reportAttributeAccessIssue]
        # Files that were there before are checked at first use, once per node.
        self._unchecked = SharedArray(self.num_shards, np.uint8, _get_path(self._shm_prefix_int, 'unchecked'))
        if self._unique_rank_world.is_local_leader:
            self._failure.clear()
            self._unchecked[:] = self._shard_states.numpy() == _ShardState.LOCAL
        dist.barrier()
        self._expected = 0

    # ------------------------------------------------------------------------------------------------- one shard
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self._failure.set(f'{error}' if isinstance(error, ShardError) else
                            f'shard {self._shard_name(shard_id)}: {type(error).__name__}: {error}')
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
        stream = self.streams[self.stream_per_shard[shard_id]]
        assert isinstance(stream, VerifiedStream)
        if removed := stream.discard_damaged(self.shards[shard_id]):
            self.cache_usage -= removed
            self._shard_states[shard_id] = _ShardState.REMOTE
        self._unchecked[shard_id] = 0

    def _shard_name(self, shard_id: int) -> str:
        stream = self.streams[self.stream_per_shard[shard_id]]
        name = self.shards[shard_id].file_pairs[0][0].basename
        return os.path.join(stream.remote or stream.local, stream.split, name)

    # ------------------------------------------------------------------------------------------------- one epoch
    def on_exception(self, future: Future) -> None:
        if (error := future.exception()) is not None:
            self._failure.set(f'{type(error).__name__}: {error}')

    def _prepare_thread(self, it: _Iterator) -> None:
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()  # or the end of the epoch waits for it
            raise

    def _ready_thread(self, it: _Iterator) -> None:
        """As Streaming's, but a shard that was evicted again before it was used is downloaded again."""
        try:
            self._wait_for_shards(it)
        finally:
            it.on_exit()

    def _wait_for_shards(self, it: _Iterator) -> None:
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

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        if self._failure.is_set():
            raise ShardError(str(self._failure))

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        work = super()._get_work(epoch, sample_in_epoch)
        self._expected = int((work != -1).sum())
        return work

    def __iter__(self) -> Iterator[dict[str, Any]]:
        delivered = 0
        for sample in super().__iter__():
            delivered += 1
            yield sample
        if delivered != self._expected:
            raise ShardError(f'the epoch ended after {delivered} of the {self._expected} samples of this worker')


def _claim_caches(streams: Sequence[Stream]) -> list[BinaryIO]:
    """Lock the caches of remote datasets for this process and its children, and forget killed runs that used them.

    Streaming registers caches in shared memory, which outlives a killed run; the lock does not.
    """
    locks: list[BinaryIO] = []
    if dist.get_local_rank() == 0:
        caches = {folder for stream in streams for folder in _caches(stream)}
        for folder in sorted(caches):
            os.makedirs(folder, exist_ok=True)
            lock = open(os.path.join(folder, _LOCK_FILE), 'wb')  # noqa: SIM115
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _lock(lock):
                if time.monotonic() > deadline:
                    raise ShardError(f'{folder} is the cache of another run that is still alive')
                time.sleep(0.2)
            locks.append(lock)
        _forget_killed_runs(caches)
    dist.barrier()
    return locks


def _caches(stream: Stream) -> list[str]:
    own = [os.path.abspath(os.path.join(stream.local, stream.split or ''))] if stream.remote is not None else []
    return own + [cache for sidecar in getattr(stream, 'sidecars', ()) for cache in _caches(sidecar)]


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_killed_runs(caches: set[str]) -> None:
    for registered in Path('/dev/shm').glob(f'[0-9]*_{LOCALS}'):
        if caches.intersection(_unpack_locals(registered.read_bytes())[0]):
            for segment in registered.parent.glob(f'{registered.name.partition("_")[0]}_*'):
                segment.unlink(missing_ok=True)
