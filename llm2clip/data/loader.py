# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data loading shared by all trainings: streams, the loader, and an upper bound on its shared memory."""

import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from composer.core import DataSpec
from composer.utils import dist
from streaming import StreamingDataLoader, StreamingDataset

from llm2clip.config import LoaderConfig, StreamConfig
from llm2clip.data.schema import NEGATIVE, caption_keys, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.errors import ConfigError

# Interval at which a worker checks that its rank is alive.
_WATCH_SECONDS = 1.0


def streaming_dataset(data: DataSpec) -> StreamingDataset:
    """Return the dataset of a loader made by `build_loader`."""
    assert isinstance(data.dataloader, StreamingDataLoader) and isinstance(data.dataloader.dataset, StreamingDataset)
    return data.dataloader.dataset


def device_batch_size(global_batch_size: int, key: str) -> int:
    """Return this rank's share of a global batch; raise a ConfigError if the ranks cannot share it evenly."""
    world = dist.get_world_size()
    if global_batch_size % world:
        raise ConfigError(f'{key}: {global_batch_size} is not divisible by the number of ranks, {world}')
    return global_batch_size // world


def stream_arguments(name: str, stream: StreamConfig, key: str) -> dict[str, Any]:
    """Return the keyword arguments of a Stream; raise a ConfigError if a local dataset is missing."""
    if stream.remote is None and not Path(stream.local, 'index.json').is_file():
        raise ConfigError(f'{key}.streams.{name}.local: there is no MDS dataset in {stream.local}')
    arguments: dict[str, Any] = {'local': stream.local, 'remote': stream.remote}
    for weight in ('proportion', 'repeat'):
        if getattr(stream, weight) is not None:
            arguments[weight] = getattr(stream, weight)
    return arguments


def all_caption_keys(name: str, stream: StreamConfig, key: str, setting: str) -> list[str]:
    """Return every caption key of a dataset except hard negatives, for a `setting` that names none.

    Raises:
        ConfigError: The dataset is missing, has no captions, or is in a remote.
    """
    if stream.remote is not None:
        raise ConfigError(f'{key}.{setting}: expected caption keys, since dataset {name} is in a remote, and '
                          'which ones it has is not known yet')
    columns = read_columns(stream_arguments(name, stream, key)['local'])
    keys = [caption for caption in caption_keys(columns) if not caption.startswith(NEGATIVE)]
    if not keys:
        raise ConfigError(f'{key}.streams.{name}.local: the dataset in {stream.local} has no captions')
    return keys


def build_loader(
    streams: Mapping[str, VerifiedStream], make: Callable[[SafeDataset, Any, int], dict[str, Any]],
    config: LoaderConfig, global_batch_size: int, seed: int, train: bool, key: str,
    collate_fn: Optional[Callable[[list[Any]], Any]] = None, batching_method: str = 'random', **data_spec: Any,
) -> DataSpec:
    """Build the loader of this rank's batches; raise a ConfigError if `streams`, sizes and `config` do not fit.

    Args:
        streams: Name -> stream.
        make: As for `SafeDataset`.
        config: Shuffling, workers, downloads and cache.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of all randomness of a sample.
        train: Drop the last incomplete batch; otherwise keep every sample and the stored order.
        key: Configuration key of `config`, for error messages.
        collate_fn: Function that makes a batch of samples.
        batching_method: Streaming's batching method; ``per_stream`` takes each global batch from one stream.
        **data_spec: Passed to Composer's DataSpec.
    """
    if not streams:
        raise ConfigError(f'{key}.streams: name at least one dataset')
    if config.cache_limit is not None:
        for name, stream in streams.items():
            parts = [stream, *getattr(stream, 'text_embeddings', [])]
            if any(part.remote is None for part in parts):
                raise ConfigError(f'{key}.cache_limit: dataset {name} has no remote, and the limit would delete it')
    epoch_size = int(config.epoch_size) if train and config.epoch_size is not None else None
    batch_size_key = 'global_train_batch_size' if train else 'global_eval_batch_size'
    batch_size = device_batch_size(global_batch_size, batch_size_key)
    dataset = SafeDataset(
        list(streams.values()), make, seed, batch_size=batch_size, epoch_size=epoch_size,
        shuffle=config.shuffle and train, shuffle_seed=config.shuffle_seed, batching_method=batching_method,
        num_canonical_nodes=config.num_canonical_nodes, download_retry=config.download_retry,
        download_timeout=config.download_timeout, cache_limit=config.cache_limit)
    if train and dataset.epoch_size < global_batch_size:
        raise ConfigError(f'global_train_batch_size: {global_batch_size}, but an epoch of {key} has '
                          f'{dataset.epoch_size} samples, expected at least one global batch')
    for name, stream in streams.items():
        if batching_method == 'per_stream' and train and int(stream.choose) < global_batch_size:
            raise ConfigError(f'{key}.streams.{name}: an epoch takes {stream.choose} samples of it, expected as '
                              f'many as one global batch has, {global_batch_size}, since that comes from one '
                              f'dataset; repeat it, or leave it out by {key}.streams.{name}=null')
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        drop_last=train,
        collate_fn=collate_fn,
        persistent_workers=train and config.num_workers > 0,
        # Composer has initialised CUDA by now; its copies to the GPU are asynchronous only from pinned memory.
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=partial(_end_with_rank, os.getpid()),
        # The workers' seed is not drawn from the global generator, which would shift dropout after a resumption.
        generator=torch.Generator().manual_seed(config.shuffle_seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']), **data_spec)


def _end_with_rank(rank: int, worker: int) -> None:
    """End this worker soon after its rank, with process id `rank`, is killed.

    PyTorch checks this only between two samples.  A worker at Streaming's barrier would wait forever for the
    workers of another killed rank, and keep its memory.
    """
    def watch() -> None:
        while os.getppid() == rank:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name=f'end_with_rank_{worker}', daemon=True).start()


def shared_memory(batch: Mapping[str, Any], num_workers: int, ranks: int = 1, epoch_samples: int = 0) -> int:
    """Return the maximum ``/dev/shm`` bytes per node of a loader of pinned batches, except a few pages of Streaming's.

    Args:
        batch: Largest batch of a rank, as the workers deliver it, on any device including ``meta``.  Each
            tensor takes whole pages, lists take none.
        num_workers: Workers per rank.
        ranks: Ranks on the node.
        epoch_samples: Samples per epoch; Streaming stores their order in shared memory while it is generated.
    """
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    batch_bytes = sum(math.ceil(tensor.nbytes / mmap.PAGESIZE) * mmap.PAGESIZE for tensor in tensors)
    batches = ranks * num_workers * 2  # torch prefetches two batches per worker by default
    return batches * batch_bytes + 8 * epoch_samples
