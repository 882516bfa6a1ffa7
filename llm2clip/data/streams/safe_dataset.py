# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""StreamingDataset that either delivers every sample of an epoch or stops with an error that names the cause.

In Streaming, an exception in the thread that downloads ahead ends the epoch early and silently in its process,
and workers that need the same shard wait forever.  Here that thread stores the error, and the next request for a
missing shard raises it.  Other processes try the download themselves and raise their own errors.

This module relies on these parts of StreamingDataset in Streaming 0.13:

- `_ready_thread`, which is overridden: it advances `ready_index`, the limit up to which samples are delivered;
- `_shard_states`: the `_ShardState` of each shard, shared by all processes of a node;
- names in shared memory, six digits per dataset and a suffix: ``_locals`` holds the folders of the dataset.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import xxhash
from composer.utils import dist
from filelock import FileLock, Timeout
from streaming import StreamingDataset
from streaming.base.constant import LOCALS, TICK
from streaming.base.dataset import _ShardState

from llm2clip.data.captions import sample_seed
from llm2clip.data.schema import SAMPLE_ID
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import ConfigError

_LOCK_FILE = '.in_use'
_LOCK_SECONDS = 30.0


def with_repeats(samples: int, nodes: int) -> int:
    """Return the samples of an epoch, with those that Streaming repeats to give `nodes` equal numbers."""
    return math.ceil(samples / nodes) * nodes


class SafeDataset(StreamingDataset):
    """StreamingDataset of VerifiedStreams, with a random seed per sample and epoch.

    Args:
        streams: The streams.
        make: Function of the dataset, a sample and its position.  It returns the batch entries of the sample,
            besides ``index`` and ``sample_id``, each time the sample is read.  Unset, samples are delivered.
        seed: Seed of all randomness of the samples.
        **kwargs: Passed to StreamingDataset.

    Raises:
        ShardError: On construction or while iterating: a shard is missing or damaged and cannot be
            downloaded, or another run uses the cache.
    """

    def __init__(
        self, streams: Sequence[VerifiedStream],
        make: Optional[Callable[['SafeDataset', Any, int], dict[str, Any]]] = None, seed: int = 0, **kwargs: Any
    ) -> None:
        self._cache_locks = _lock_caches({*itertools.chain.from_iterable(stream.caches() for stream in streams)})
        super().__init__(streams=streams, **kwargs)
        self.make = make
        self.seed = seed
        self._failure: Optional[Exception] = None
        # Files from earlier runs are verified at first use, by one worker of each rank.
        self._unchecked = multiprocessing.RawArray('b', b'\1' * self.num_shards)

    # ------------------------------------------------------------------------------------------------- shards
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Verify an existing file and prepare the shard; store a failure, and raise it if `blocking`."""
        if self._failure is None:
            try:
                if self._unchecked[shard_id]:
                    self._verify(shard_id)
                super().prepare_shard(shard_id, blocking)
            except Exception as error:
                self._failure = error
                self._shard_states[shard_id] = _ShardState.REMOTE  # otherwise other processes wait for it
        if self._failure is not None and blocking:
            raise self._failure

    def _verify(self, shard_id: int) -> None:
        """Remove a damaged file of a shard, and mark a shard that lacks a file as not local."""
        shard = self.shards[shard_id]
        stream = self.streams[self.stream_per_shard[shard_id]]
        assert isinstance(stream, VerifiedStream)
        removed = stream.discard_damaged(shard)
        if removed:
            self.cache_usage -= removed
        # A shard with embeddings may lack one of its files.
        is_missing = not stream.is_local(shard)
        if removed or is_missing and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._shard_states[shard_id] = _ShardState.REMOTE
        self._unchecked[shard_id] = 0

    def _ready_thread(self, it: Any) -> None:
        """Mark samples as ready as soon as their shards are requested, since `get_item` waits for the shards.

        Streaming's thread would wait forever for a shard that is evicted or cannot be downloaded elsewhere.
        """
        while not it.should_exit() and it.ready_index < it.total:
            it.ready_index = it.prepare_index
            time.sleep(TICK)
        it.on_exit()

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Read a sample once its shard is prepared; Streaming alone would read any file that exists."""
        shard_id = int(self.spanner[sample_id][0])
        while self._unchecked[shard_id] or self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        return super().get_item(sample_id, retry)

    # ------------------------------------------------------------------------------------------------- epochs
    @property
    def epoch(self) -> int:
        """Current epoch, 0 before the first; no worker begins one before all have ended the previous one."""
        return max(self.next_epoch - 1, 0)

    def __len__(self) -> int:
        """Return the number of samples that this rank gets in an epoch.

        Streaming repeats some to fill its canonical nodes, which its own length does not count.  Composer reads
        ``len(loader)`` batches: it would leave out images of an evaluation, and lengthen an epoch that it resumes.
        """
        ranks = dist.get_world_size()
        nodes = max(self.num_canonical_nodes or 1, ranks // dist.get_local_world_size())

        def samples_per_rank(samples: int) -> int:
            return math.ceil(with_repeats(samples, nodes) / ranks)

        if self.batching_method != 'per_stream':
            return samples_per_rank(self.epoch_size)
        # Only batches that one stream can fill are delivered.
        assert self.batch_size is not None
        batches = sum(samples_per_rank(int(stream.choose)) // self.batch_size for stream in self.streams)
        return batches * self.batch_size

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return Streaming's state, with a description of the data."""
        return super().state_dict(num_samples, from_beginning) | {'data': self._data()}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Load a state; with changed data, Streaming would resume at the same position of another order.

        Raises:
            ConfigError: The data have changed since the state was saved.
        """
        then = obj['data']
        now = self._data()
        if then != now:
            change = 'as many samples, but not the same'
            if then['samples'] != now['samples']:
                change = (f'{then["samples"]:,} samples in {then["shards"]:,} shards then, {now["samples"]:,} in '
                          f'{now["shards"]:,} now')
            raise ConfigError(f'train_data: the data have changed since the checkpoint was written ({change}), '
                              'expected those with which the run began; choose another save_folder for a run on these '
                              'data')
        super().load_state_dict(obj)

    def _data(self) -> dict[str, Any]:
        """Number of samples and shards, and a hash of their content; of images with embeddings datasets, only
        the images count."""
        contents = ' '.join(stream.content for stream in self.streams if isinstance(stream, VerifiedStream))
        return {'samples': self.num_samples, 'shards': self.num_shards, 'content': xxhash.xxh64_hexdigest(contents)}

    # ------------------------------------------------------------------------------------------------- samples
    def __getitem__(self, at: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        if self.make is None:
            return sample
        return {'index': at, 'sample_id': sample[SAMPLE_ID]} | self.make(self, sample, at)

    def stream_of(self, at: int) -> int:
        """Return the index of the stream of sample `at`."""
        return int(self.stream_per_shard[self.spanner[at][0]])

    def sample_seed(self, sample: Any) -> int:
        """Return the seed of this sample in the current epoch."""
        return sample_seed(self.seed, self.epoch, sample[SAMPLE_ID])

    def another(self, at: int, seed: int) -> Any:
        """Draw another sample of the shard of sample `at`, uniformly, since other shards may not be local;
        None if the shard has no other sample."""
        shard, place = map(int, self.spanner[at])
        size = int(self.samples_per_shard[shard])
        if size == 1:
            return None
        other = (place + 1 + xxhash.xxh64_intdigest('another', seed=seed) % (size - 1)) % size
        return self.get_item(at - place + other)


def _lock_caches(caches: set[str]) -> list[FileLock]:
    """Lock caches, on the first rank of a node, and remove the registrations of killed runs that used them.

    Streaming registers the folders of a dataset in shared memory, and refuses a registered cache.  Shared
    memory outlives a killed run; a file lock does not.
    """
    locks: list[FileLock] = []
    if dist.get_local_rank() == 0:
        for folder in sorted(caches):
            os.makedirs(folder, exist_ok=True)
            locks.append(FileLock(os.path.join(folder, _LOCK_FILE), timeout=_LOCK_SECONDS))
            try:
                locks[-1].acquire()
            except Timeout:
                raise ShardError(f'{folder} is the cache of another run that is still alive') from None
        for registered in Path('/dev/shm').glob(f'[0-9]*_{LOCALS}'):
            # It may be another user's, or of a run that has just ended.
            with contextlib.suppress(OSError):
                if caches.intersection(os.fsdecode(registered.read_bytes()[4:]).split('\0')):
                    for segment in registered.parent.glob(f'{registered.name.partition("_")[0]}_*'):
                        segment.unlink(missing_ok=True)
    dist.barrier()
    return locks
