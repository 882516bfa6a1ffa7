# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the loaders of all trainings share: streams, the loader itself, and the shared memory that it fills."""

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

from llm2clip.config import ConfigError, LoaderConfig, StreamConfig
from llm2clip.data.schema import caption_keys, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream

__all__ = [
    'all_caption_keys', 'build_loader', 'device_batch_size', 'shared_memory', 'stream_arguments', 'streaming_dataset',
]

# A worker looks for its rank this often.
_WATCH_SECONDS = 1.0


def streaming_dataset(data: DataSpec) -> StreamingDataset:
    """The dataset behind a loader that `build_loader` made."""
    assert isinstance(data.dataloader, StreamingDataLoader) and isinstance(data.dataloader.dataset, StreamingDataset)
    return data.dataloader.dataset


def device_batch_size(global_batch_size: int, key: str) -> int:
    """This rank's share of a global batch; a ConfigError if the ranks cannot share it evenly."""
    world = dist.get_world_size()
    if global_batch_size % world:
        raise ConfigError(f'{key}: {global_batch_size} is not divisible by the number of ranks, {world}')
    return global_batch_size // world


def stream_arguments(name: str, stream: StreamConfig, key: str) -> dict[str, Any]:
    """Keyword arguments of a Stream; a ConfigError if a dataset without remote is missing."""
    if stream.remote is None and not Path(stream.local, 'index.json').is_file():
        raise ConfigError(f'{key}.streams.{name}.local: there is no MDS dataset in {stream.local}')
    weights = {k: v for k in ('proportion', 'repeat') if (v := getattr(stream, k)) is not None}
    return {'local': stream.local, 'remote': stream.remote, **weights}


def all_caption_keys(name: str, stream: StreamConfig, key: str, setting: str) -> list[str]:
    """Every caption key of a dataset, where the `setting` of ``key`` that would name some is left out.

    Raises:
        ConfigError: The dataset is missing, has no captions, or is not here yet.
    """
    if stream.remote is not None:
        raise ConfigError(f'{key}.{setting}: expected caption keys, since dataset {name} is in a remote, and which '
                          'ones it has is not known yet')
    keys = caption_keys(read_columns(stream_arguments(name, stream, key)['local']))
    if not keys:
        raise ConfigError(f'{key}.streams.{name}.local: the dataset in {stream.local} has no captions')
    return keys


def build_loader(
    streams: Mapping[str, VerifiedStream],
    make: Callable[[SafeDataset, Any, int], dict[str, Any]],
    config: LoaderConfig,
    global_batch_size: int,
    seed: int,
    train: bool,
    key: str,
    collate_fn: Optional[Callable[[list[Any]], Any]] = None,
    batching_method: str = 'random',
    **data_spec: Any,
) -> DataSpec:
    """Streams -> loader of this rank's batches.

    Args:
        streams: Name -> stream.
        make: As for `SafeDataset`.
        config: Order and workers.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of everything random about a sample.
        train: Drop the last incomplete batch; otherwise keep every sample and the stored order.
        key: Where `config` stands in the configuration, for messages.
        collate_fn: Samples -> batch.
        batching_method: Streaming's; ``per_stream`` takes each global batch from one stream.
        **data_spec: Passed to Composer's DataSpec.
    """
    if not streams:
        raise ConfigError(f'{key}.streams: name at least one dataset')
    if config.cache_limit is not None:
        for name, stream in streams.items():
            if None in (stream.remote, *(embeddings.remote for embeddings in getattr(stream, 'text_embeddings', ()))):
                raise ConfigError(f'{key}.cache_limit: dataset {name} has no remote, and the limit would delete it')
    batch_size = device_batch_size(global_batch_size, 'global_train_batch_size' if train else 'global_eval_batch_size')
    dataset = SafeDataset(
        list(streams.values()), make, seed,
        batch_size=batch_size,
        shuffle=config.shuffle and train,
        shuffle_seed=config.shuffle_seed,
        num_canonical_nodes=config.num_canonical_nodes,
        epoch_size=None if config.epoch_size is None or not train else int(config.epoch_size),
        batching_method=batching_method,
        download_retry=config.download_retry,
        download_timeout=config.download_timeout,
        cache_limit=config.cache_limit,
    )
    if train and dataset.epoch_size < global_batch_size:
        raise ConfigError(f'{key}: an epoch has {dataset.epoch_size} samples, fewer than one global batch of '
                          f'{global_batch_size}')
    for name, stream in streams.items():
        if batching_method == 'per_stream' and train and int(stream.choose) < global_batch_size:
            raise ConfigError(f'{key}.streams.{name}: an epoch takes {stream.choose} samples of it, expected as many '
                              f'as one global batch has, {global_batch_size}, since that comes from one dataset; '
                              f'repeat it, or leave it out by {key}.streams.{name}=null')
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        drop_last=train,
        collate_fn=collate_fn,
        persistent_workers=train and config.num_workers > 0,
        # Composer has begun to use the GPU by now; its copies are asynchronous if what they read is pinned.
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=partial(_end_with_rank, os.getpid()),
        # Its own generator: drawing the workers' seed from the global one would shift dropout when a run resumes.
        generator=torch.Generator().manual_seed(config.shuffle_seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']), **data_spec)


def _end_with_rank(rank: int, worker: int) -> None:
    """Ends a worker soon after its rank, of this process id, was killed.

    PyTorch looks for that only between two samples: a worker that waits at Streaming's barrier for the workers of
    another killed rank would wait there for ever, and keep its memory.
    """
    def watch() -> None:
        while os.getppid() == rank:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name=f'end_with_rank_{worker}', daemon=True).start()


def shared_memory(batch: Mapping[str, Any], num_workers: int, ranks: int = 1, epoch_samples: int = 0) -> int:
    """Most bytes of ``/dev/shm`` that a loader of pinned batches fills on a node, but for a few pages of Streaming's.

    Args:
        batch: A rank's at its largest, as the workers deliver it; on any device, also without data.  Each of its
            tensors takes whole pages, lists take none.
        num_workers: Of each rank.
        ranks: On the node.
        epoch_samples: Of the dataset, in one epoch, whose order lies there while it is drawn.
    """
    sizes = [value.numel() * value.element_size() for value in batch.values() if isinstance(value, torch.Tensor)]
    of_batch = sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)
    return ranks * num_workers * 2 * of_batch + 8 * epoch_samples  # two batches per worker is torch's default
