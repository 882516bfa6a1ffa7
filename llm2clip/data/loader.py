# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data loading shared by all trainings: streams, the loader, and an upper bound on its shared memory."""

import math
import mmap
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Optional

import torch
from composer.core import DataSpec
from streaming import StreamingDataLoader, StreamingDataset

from llm2clip.config import DatasetConfig, StreamConfig
from llm2clip.data.schema import CAPTION, caption_keys, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.errors import ConfigError
from llm2clip.io.processes import end_with_parent


def streaming_dataset(data: DataSpec) -> StreamingDataset:
    """Return the dataset of a loader made by `build_loader`."""
    loader: Any = data.dataloader
    return loader.dataset


def stream_arguments(stream: StreamConfig) -> dict[str, Any]:
    """Return keyword arguments of a VerifiedStream."""
    return {'local': stream.local, 'remote': stream.remote,
            'proportion': stream.proportion, 'repeat': stream.repeat}


def all_keys(dataset: DatasetConfig, prefix: str, setting: str) -> list[str]:
    """Return the keys of the columns `prefix` of a dataset; `setting` names none.

    Raises:
        ConfigError: The dataset is in a remote.
        FileError: The dataset is missing.
    """
    if dataset.remote is not None:
        raise ConfigError(f'expected caption keys, since the dataset {dataset.remote} is in a remote, and '
                          'which ones it has is not known yet', setting)
    return caption_keys(read_columns(dataset.local), prefix)


def all_caption_keys(stream: StreamConfig, setting: str) -> list[str]:
    """Return every caption key of a dataset as `all_keys` does.

    Raises:
        ConfigError: The dataset has no captions, or is in a remote.
        FileError: The dataset is missing.
    """
    keys = all_keys(stream, CAPTION, setting)
    if not keys:
        raise ConfigError(f'the dataset in {stream.local} has no captions', 'local')
    return keys


def positive_weights(
    stream_weights: Optional[Mapping[str, float]], default: Mapping[str, float]
) -> dict[str, float]:
    """Return caption key -> weight above 0 from the weights of a stream or, if None, of all streams."""
    weights = default if stream_weights is None else stream_weights
    return {key: weight for key, weight in weights.items() if weight}


def build_loader(dataset: SafeDataset, **data_spec: Any) -> DataSpec:
    """Build the loader of this rank's batches, which drops the last incomplete one in training.  `data_spec`
    are arguments of Composer's DataSpec."""
    config = dataset.config
    loader = StreamingDataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=config.num_workers,
        drop_last=dataset.train,
        collate_fn=dataset.collate,
        persistent_workers=dataset.train and config.num_workers > 0,
        # Composer has initialised CUDA by now.  Only copies from pinned memory to the GPU are asynchronous.
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=partial(end_with_parent, os.getpid()),
        # Drawing the workers' seed from the global generator would shift dropout after a resumption.
        generator=torch.Generator().manual_seed(config.shuffle_seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']), **data_spec)


def shared_memory(batch: Mapping[str, Any], num_workers: int, ranks: int = 1, epoch_samples: int = 0) -> int:
    """Return the maximum ``/dev/shm`` bytes per node of a loader of pinned batches, but for a few pages of
    Streaming.

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
