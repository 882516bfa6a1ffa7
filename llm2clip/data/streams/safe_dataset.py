# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A StreamingDataset that either delivers every sample of an epoch or stops with an error that says why.

In Streaming, an exception of the thread that downloads ahead ends the epoch early and silently in its process, and
workers that need the same shard wait for ever.  Here that thread keeps the error for whoever asks for a sample of the
shard; other processes try for themselves, and raise errors of their own.

Of StreamingDataset in Streaming 0.13 this relies on:

- `_ready_thread`, which is overridden: it moves `ready_index`, up to which samples are delivered;
- `_shard_states`: what all processes of a node know of a shard, in the values of `_ShardState`;
- names in shared memory: six digits for a dataset, and what each is; the folders of a dataset are in its ``_locals``.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import xxhash
from composer.utils import dist
from filelock import FileLock, Timeout
from streaming import StreamingDataset
from streaming.base.constant import LOCALS, TICK
from streaming.base.dataset import _ShardState

from llm2clip.config import ConfigError
from llm2clip.data.captions import sample_seed
from llm2clip.data.schema import SAMPLE_ID
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream

__all__ = ['SafeDataset']

_LOCK_FILE = '.in_use'
_LOCK_SECONDS = 30.0


class SafeDataset(StreamingDataset):
    """A StreamingDataset of VerifiedStreams whose samples know the epoch they are seen in.

    Args:
        streams: The streams.
        make: The dataset, one of its samples and its position -> what goes into a batch, besides position and id, each
            time the sample is seen; unset, the sample itself.
        seed: Seed of everything random about a sample.
        **kwargs: Passed to StreamingDataset.

    Raises:
        ShardError: On construction or while iterating: a shard cannot be had as its index describes it, or another run
            uses the cache.
    """

    def __init__(
        self, streams: Sequence[VerifiedStream],
        make: Optional[Callable[['SafeDataset', Any, int], dict[str, Any]]] = None, seed: int = 0, **kwargs: Any
    ) -> None:
        self._cache_locks = _lock_caches(folder for stream in streams for folder in stream.caches())
        super().__init__(streams=streams, **kwargs)
        self.make, self.seed = make, seed
        self._failure: Optional[Exception] = None
        # Files that were there before are checked at first use, by one of a rank's workers.
        self._unchecked = multiprocessing.RawArray('b', b'\1' * self.num_shards)

    # ------------------------------------------------------------------------------------------------- shards
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Streaming's, of a file that has been checked.  A failure is kept, and raised where somebody waits for it."""
        if self._failure is None:
            try:
                if self._unchecked[shard_id]:
                    stream = self.streams[self.stream_per_shard[shard_id]]
                    assert isinstance(stream, VerifiedStream)
                    if removed := stream.discard_damaged(self.shards[shard_id]):
                        self.cache_usage -= removed
                        self._shard_states[shard_id] = _ShardState.REMOTE
                    self._unchecked[shard_id] = 0
                super().prepare_shard(shard_id, blocking)
            except Exception as error:
                self._failure = error
                self._shard_states[shard_id] = _ShardState.REMOTE  # or others would wait for it
        if self._failure is not None and blocking:
            raise self._failure

    def _ready_thread(self, it: Any) -> None:
        """Samples are ready as soon as their shards have been asked for, since `get_item` waits for them.

        Streaming's would wait for ever for a shard that is evicted again, or that another process fails to download.
        """
        while not it.should_exit() and it.ready_index < it.total:
            it.ready_index = it.prepare_index
            time.sleep(TICK)
        it.on_exit()

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Streaming's, which would read whatever file is there, after the shard has been prepared."""
        shard_id = int(self.spanner[sample_id][0])
        while self._unchecked[shard_id] or self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        return super().get_item(sample_id, retry)

    # ------------------------------------------------------------------------------------------------- epochs
    @property
    def epoch(self) -> int:
        """The epoch that is read, or the first; no worker begins the next before all have ended this one."""
        return max(self.next_epoch - 1, 0)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Streaming's, and of which data it is."""
        return {**super().state_dict(num_samples, from_beginning), 'data': self._data()}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """As Streaming's, which would go on at the same place of another order.

        Raises:
            ConfigError: The state is of other data.
        """
        then, now = obj['data'], self._data()
        if then != now:
            change = 'as many samples, but not the same' if then['samples'] == now['samples'] else (
                f'{then["samples"]:,} samples in {then["shards"]:,} shards then, {now["samples"]:,} in '
                f'{now["shards"]:,} now')
            raise ConfigError(f'train_data: the data have changed since the checkpoint was written ({change}), '
                              'expected those with which the run began; choose another save_folder for a run on these '
                              'data')
        super().load_state_dict(obj)

    def _data(self) -> dict[str, Any]:
        """Number of samples and shards, and a hash of their content, of the images' where they have embeddings
        datasets."""
        contents = [stream.content for stream in self.streams if isinstance(stream, VerifiedStream)]
        return {'samples': self.num_samples, 'shards': self.num_shards,
                'content': xxhash.xxh64(' '.join(contents)).hexdigest()}

    # ------------------------------------------------------------------------------------------------- samples
    def __getitem__(self, at: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        if self.make is None:
            return sample
        return {'index': at, 'sample_id': sample[SAMPLE_ID], **self.make(self, sample, at)}

    def stream_of(self, at: int) -> int:
        """Index of the stream that sample `at` comes from."""
        return int(self.stream_per_shard[self.spanner[at][0]])

    def sample_seed(self, sample: Any) -> int:
        """Seed of this sample in this epoch."""
        return sample_seed(self.seed, self.epoch, sample[SAMPLE_ID])

    def another(self, at: int, seed: int) -> Any:
        """Another sample of the shard of sample `at`, all of them alike, which is here where other shards may not be;
        None if there is no other."""
        shard, place = map(int, self.spanner[at])
        size = int(self.samples_per_shard[shard])
        if size == 1:
            return None
        other = (place + 1 + xxhash.xxh64_intdigest('another', seed=seed) % (size - 1)) % size
        return self.get_item(at - place + other)


def _lock_caches(folders: Iterable[str]) -> list[FileLock]:
    """Lock caches for this process, if it is the first rank of its node, and forget killed runs that used them.

    Streaming registers the folders that a dataset uses in shared memory, and refuses a cache that is registered.
    Shared memory outlives a killed run, a file lock does not.
    """
    locks: list[FileLock] = []
    if dist.get_local_rank() == 0:
        caches = set(folders)
        for folder in sorted(caches):
            os.makedirs(folder, exist_ok=True)
            locks.append(FileLock(os.path.join(folder, _LOCK_FILE), timeout=_LOCK_SECONDS))
            try:
                locks[-1].acquire()
            except Timeout:
                raise ShardError(f'{folder} is the cache of another run that is still alive') from None
        for registered in Path('/dev/shm').glob(f'[0-9]*_{LOCALS}'):
            if caches.intersection(os.fsdecode(registered.read_bytes()[4:]).split('\0')):
                for segment in registered.parent.glob(f'{registered.name.partition("_")[0]}_*'):
                    segment.unlink(missing_ok=True)
    dist.barrier()
    return locks
