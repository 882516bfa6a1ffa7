# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""StreamingDataset that either delivers every sample of an epoch or stops with an error that names the cause.

In Streaming, an exception in the thread that downloads ahead ends the epoch early and silently in its
process, and workers that need the same shard wait forever.  Here that thread stores the error, and the next
request for a missing shard raises it.  Other processes try the download themselves and raise their own
errors.

This module relies on these parts of StreamingDataset in Streaming 0.13:

- `_ready_thread`, which is overridden: it advances `ready_index`, up to which samples are delivered;
- `_shard_states`: the `_ShardState` of each shard, shared by all processes of a node;
- `get_partitions`, which `streaming.base.batching.random` calls by its name: it is replaced;
- `Spanner` and `get_sampling`, which `streaming.base.dataset` calls by their names: they are replaced;
- names in shared memory, six digits per dataset (`_shm_prefix_int`) and a suffix: ``_locals`` holds the
  folders of the dataset.
"""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base import partition
from streaming.base.batching import random as random_batching
from streaming.base.constant import LOCALS, TICK
from streaming.base.dataset import _ShardState
from torch.utils.data import default_collate

from llm2clip.config import LoaderConfig
from llm2clip.data.captions import sample_seed
from llm2clip.data.schema import SAMPLE_ID
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import ConfigError
from llm2clip.io.folders import CACHE_LOCK
from llm2clip.ranks import dist

_LOCK_SECONDS = 30.0
_SHARED_MEMORY = Path('/dev/shm')
_MARKER = 'llm2clip'
# Seconds after which the shared memory of a process that has not locked its marker belongs to nobody.
_STALE_SECONDS = 60.0


def device_batch_size(global_batch_size: int, key: str) -> int:
    """Return this rank's share of a global batch; raise a ConfigError if the ranks cannot share it evenly."""
    world = dist.get_world_size()
    if global_batch_size % world:
        raise ConfigError(f'{global_batch_size} is not divisible by the number of ranks, {world}', key,
                          is_absolute=True)
    return global_batch_size // world


def padded_epoch_size(samples: int, nodes: int) -> int:
    """Return the samples of an epoch, with those that Streaming repeats to give `nodes` equal numbers."""
    return math.ceil(samples / nodes) * nodes


class SafeDataset(StreamingDataset):
    """StreamingDataset of VerifiedStreams, with a random seed per sample and epoch.

    It delivers samples as they are stored.  The dataset of a training overrides `__getitem__` and, where
    torch's collation does not fit, `collate`.

    Args:
        streams: Name -> stream.
        config: Shuffling, workers, downloads and cache.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of all randomness of the samples.
        train: Shuffle, and limit an epoch to `config.epoch_size`; otherwise keep every sample and the stored
            order.
        batching_method: Streaming's batching method; ``per_stream`` takes each global batch from one stream.

    Raises:
        ConfigError: `streams`, sizes and `config` do not fit.
        ShardError: On construction or while iterating: a shard is missing or damaged and cannot be
            downloaded, or another run uses the cache.
    """

    def __init__(
        self, streams: Mapping[str, VerifiedStream], config: LoaderConfig, global_batch_size: int, seed: int,
        *, train: bool, batching_method: str = 'random',
    ) -> None:
        self.config = config
        self.seed = seed
        self.train = train
        caches = _cache_folders(streams, config.cache_limit)
        batch_size_key = 'global_train_batch_size' if train else 'global_eval_batch_size'
        self.device_batch = device_batch_size(global_batch_size, batch_size_key)
        epoch_size = int(config.epoch_size) if train and config.epoch_size is not None else None
        self._cache_locks = _lock_caches(caches)
        _remove_stale_memory()
        with _no_other_starts():
            super().__init__(
                streams=list(streams.values()), batch_size=self.device_batch, epoch_size=epoch_size,
                shuffle=config.shuffle and train, shuffle_seed=config.shuffle_seed,
                num_canonical_nodes=config.num_canonical_nodes, batching_method=batching_method,
                download_retry=config.download_retry, download_timeout=config.download_timeout,
                cache_limit=config.cache_limit)
            if dist.get_local_rank() == 0:
                _mark_memory(self, self._shm_prefix_int)
        if train and self.epoch_size < global_batch_size:
            raise ConfigError(f'{global_batch_size}, but an epoch has {self.epoch_size} samples, expected at '
                              'least one global batch', batch_size_key, is_absolute=True)
        smallest = self.epoch_size
        if batching_method == 'per_stream':  # a global batch comes from one dataset
            smallest = min(int(stream.choose) for stream in streams.values())
            _check_chosen(streams, global_batch_size)
        else:
            _check_chosen(streams, 1)
        if self.shuffle and smallest < config.num_canonical_nodes:
            raise ConfigError(f'{config.num_canonical_nodes}, but an epoch takes {smallest} samples of a '
                              'dataset, expected at most as many canonical nodes as samples',
                              'num_canonical_nodes')
        self.stream_names = list(streams)
        self._verified_streams = list(streams.values())
        self._failure: Optional[Exception] = None
        # Files from earlier runs are verified at first use, by one worker of each rank.
        self._unchecked = multiprocessing.RawArray('b', b'\1' * self.num_shards)

    # ------------------------------------------------------------ shards
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
        stream = self._verified_streams[self.stream_per_shard[shard_id]]
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

    # ------------------------------------------------------------ epochs
    def resample_streams(self, epoch: int, stream_id: Optional[int] = None) -> Any:
        """Return the shards' sizes and the samples of an epoch; without an array of samples if all are read
        once."""
        sizes = self.samples_per_stream.tolist()
        if stream_id is None and [stream.choose for stream in self.streams] == sizes:
            return self.samples_per_shard, AllSamples()
        return super().resample_streams(epoch, stream_id)

    @property
    def epoch(self) -> int:
        """Current epoch, 0 before the first; no worker begins one before all have ended the previous one."""
        return max(self.next_epoch - 1, 0)

    def __len__(self) -> int:
        """Return the number of samples that this rank gets in an epoch.

        Streaming repeats some to fill its canonical nodes, which its own length does not count.  Composer
        reads ``len(loader)`` batches: it would leave out images of an evaluation, and lengthen an epoch that
        it resumes.
        """
        ranks = dist.get_world_size()
        nodes = self.config.num_canonical_nodes
        sizes, unit = [self.epoch_size], 1
        if self.batching_method == 'per_stream':  # only batches that one stream can fill are delivered
            sizes, unit = [int(stream.choose) for stream in self.streams], self.device_batch
        return sum(math.ceil(padded_epoch_size(size, nodes) / ranks) // unit * unit for size in sizes)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return Streaming's state, with a description of the data.

        At the end of an epoch, Composer asks for the state at sample 0 of the next one, which Streaming has
        not begun: its own state would repeat the epoch that has ended.
        """
        state = super().state_dict(num_samples, from_beginning)
        if num_samples == 0 and state['epoch'] == self.next_epoch - 1:
            state['epoch'] = self.next_epoch
        # One string, since sharded checkpoints load no keys that they were written without.
        return state | {'data': json.dumps(self._data())}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Load a state; with changed data, Streaming would resume at the same position of another order.

        Raises:
            ConfigError: The data have changed since the state was saved.
        """
        saved = obj['data']
        # Of older versions, which had no string and, before that, no embeddings.
        if isinstance(saved, str):
            saved = json.loads(saved)
        current = {name: value for name, value in self._data().items() if name in saved}
        if saved != current:
            raise ConfigError(
                f'the data have changed since the checkpoint was written (then {saved}, now {current}), '
                'expected those with which the run began; choose another save_folder for a run on these data',
                'train_data')
        super().load_state_dict(obj)

    def _data(self) -> dict[str, Any]:
        """Number of samples and shards, and hashes of the content of the datasets and of the embeddings
        datasets that are read beside them."""
        contents = [stream.content for stream in self._verified_streams]
        embeddings: list[str] = []
        for stream in self._verified_streams:
            embeddings += [dataset.content for dataset in stream.datasets[1:]]
        return {'samples': self.num_samples, 'shards': self.num_shards,
                'content': xxhash.xxh64_hexdigest(' '.join(contents)),
                'embeddings': xxhash.xxh64_hexdigest(' '.join(embeddings))}

    # ------------------------------------------------------------ samples
    def stream_name(self, index: int) -> str:
        """Return the name of the stream of the sample at `index`."""
        shard, _ = self.spanner[index]
        return self.stream_names[self.stream_per_shard[shard]]

    def sample_seed(self, sample: Any) -> int:
        """Return the seed of this sample in the current epoch."""
        return sample_seed(self.seed, self.epoch, sample[SAMPLE_ID])

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of samples, as torch collates them."""
        return default_collate(samples)


def _cache_folders(streams: Mapping[str, VerifiedStream], cache_limit: Optional[Any]) -> set[str]:
    """Return the folders of datasets with a remote; raise a ConfigError if a limit would delete others."""
    folders: set[str] = set()
    for name, stream in streams.items():
        for dataset in stream.datasets:
            if dataset.remote is not None:
                folders.add(os.path.abspath(os.path.join(dataset.local, dataset.split)))
            elif cache_limit is not None:
                raise ConfigError(
                    f'dataset {name} has no remote, and the limit would delete it', 'cache_limit')
    return folders


def _check_chosen(streams: Mapping[str, VerifiedStream], least: int) -> None:
    """Raise a ConfigError if an epoch takes fewer samples of a stream than `least`."""
    for name, stream in streams.items():
        if int(stream.choose) < least:
            raise ConfigError(f'an epoch takes {stream.choose} samples of it, expected at least {least}; '
                              'repeat it, or set it to null', f'streams.{name}')


def _partitions(algorithm: str, *arguments: Any) -> NDArray[np.int64]:
    """Return Streaming's partitions for any position in an epoch.

    Streaming repeats samples to fill its canonical nodes, but refuses to resume from a position among those.
    """
    return partition.algos[algorithm](*arguments)


random_batching.get_partitions = _partitions  # pyright: ignore[reportPrivateImportUsage]


class ShardFinder:
    """Finds the shard of a sample by bisection.

    Streaming's `Spanner` first lists the shard of every sample, with 8 bytes a sample in every process.
    """

    def __init__(self, shard_sizes: NDArray[np.int64]) -> None:
        self._starts = np.concatenate([np.zeros(1, np.int64), shard_sizes.cumsum()])

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return the shard of a sample, and the position of the sample in it."""
        if not 0 <= index < self._starts[-1]:
            raise IndexError(f'{index}, expected the index of one of {self._starts[-1]} samples')
        shard = int(np.searchsorted(self._starts, index, side='right')) - 1
        return shard, index - int(self._starts[shard])


streaming_dataset.Spanner = ShardFinder  # pyright: ignore[reportPrivateImportUsage]


class AllSamples:
    """Stands for an array of the numbers from 0 on, which Streaming indexes."""

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers


def samples_per_shard(
    sizes: NDArray[np.int64], choose: int, granularity: int, seed: int, epoch: int, use_epoch: bool
) -> NDArray[np.int64]:
    """Return how many of `choose` samples are drawn from each shard, the same as Streaming's `get_sampling`,
    which counts them one by one and keeps three arrays of all samples."""
    assert granularity == 1
    repeats, rest = divmod(choose, int(sizes.sum()))
    counts = sizes * repeats
    if rest:
        generator = np.random.default_rng(seed + epoch if use_epoch else seed)
        drawn = generator.permutation(int(sizes.sum()))[:rest]
        shards = np.searchsorted(sizes.cumsum(), drawn, side='right')
        counts += np.bincount(shards, minlength=len(sizes))
    return counts


streaming_dataset.get_sampling = samples_per_shard  # pyright: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def _no_other_starts() -> Iterator[None]:
    """Let no dataset of another run of this user choose its number in shared memory meanwhile.

    Streaming takes a number some time after it has found it free, and fails if it was taken in between.
    """
    lock = FileLock(_SHARED_MEMORY / f'{_MARKER}_{os.getuid()}.lock', timeout=_LOCK_SECONDS)
    if dist.get_local_rank() == 0:
        with contextlib.suppress(Timeout):  # whoever holds it so long no longer chooses
            lock.acquire()
    dist.barrier()
    try:
        yield
    finally:
        lock.release()


def _mark_memory(dataset: SafeDataset, prefix: int) -> None:
    """Lock a marker beside a dataset's shared memory, as long as this process and the dataset exist.

    The lock is shared, since a released dataset may live on when the next one takes its number.
    """
    path = _SHARED_MEMORY / f'{prefix:06}_{_MARKER}'
    marker = path.open('a')
    fcntl.flock(marker, fcntl.LOCK_SH)
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            path.unlink(missing_ok=True)
        marker.close()

    weakref.finalize(dataset, remove)


def _remove_stale_memory() -> None:
    """Remove the shared memory of datasets whose processes were killed: nobody holds the lock of the marker.

    Streaming opens the memory of every earlier dataset when it makes a new one, and may run out of files.
    """
    for path in _SHARED_MEMORY.glob(f'[0-9]*_{_MARKER}'):
        segments = list(_SHARED_MEMORY.glob(f'{path.name.partition("_")[0]}_*'))
        # It may be another user's, in use, or removed by its own process.
        with contextlib.suppress(OSError), path.open('r') as marker:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = time.time() - max(segment.stat().st_mtime for segment in segments)
            if age > _STALE_SECONDS:
                for segment in segments:
                    segment.unlink(missing_ok=True)


def _lock_caches(caches: set[str]) -> list[FileLock]:
    """Lock caches, on the first rank of a node, and remove the registrations of killed runs that used them.

    Streaming registers the folders of a dataset in shared memory, and refuses a registered cache.  Shared
    memory outlives a killed run; a file lock does not.
    """
    locks: list[FileLock] = []
    if dist.get_local_rank() == 0:
        for folder in sorted(caches):
            os.makedirs(folder, exist_ok=True)
            locks.append(FileLock(os.path.join(folder, CACHE_LOCK), timeout=_LOCK_SECONDS))
            try:
                locks[-1].acquire()
            except Timeout:
                raise ShardError(f'{folder} is the cache of another run that is still alive') from None
        for registered in _SHARED_MEMORY.glob(f'[0-9]*_{LOCALS}'):
            # It may be another user's, or of a run that has just ended.
            with contextlib.suppress(OSError):
                if caches.intersection(os.fsdecode(registered.read_bytes()[4:]).split('\0')):
                    for segment in _SHARED_MEMORY.glob(f'{registered.name.partition("_")[0]}_*'):
                        segment.unlink(missing_ok=True)
    dist.barrier()
    return locks
