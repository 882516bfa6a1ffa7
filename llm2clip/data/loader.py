# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the datasets of both stages share: the epoch, sample seeds, the loader, and microbatches."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
import xxhash
from composer.core import DataSpec
from composer.utils import dist
from streaming import StreamingDataLoader, StreamingDataset

from llm2clip.config import CaptionDataConfig, ConfigError, LoaderConfig, StreamConfig
from llm2clip.data.captions import sample_seed
from llm2clip.data.schema import SAMPLE_ID, caption_keys, check_dataset, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.remote_code.text_encoder_llm2clip import pack

__all__ = [
    'Another', 'MakeText', 'SeededDataset', 'TextDataset', 'all_caption_keys', 'build_loader', 'build_text_loader',
    'count_tokens', 'device_batch_size', 'pack_sides', 'split_by_length', 'split_packed', 'stream_arguments',
    'streaming_dataset', 'text_sides',
]

_IDS, _MASK = 'input_ids', 'attention_mask'
# A worker looks for its rank this often.
_WATCH_SECONDS = 1.0
# Seed -> another sample of a sample's shard, or None where there is no other.
Another = Callable[[int], Optional[dict[str, Any]]]
# A sample, the index of its stream, its seed in this epoch, and its neighbours -> what goes into a batch.
MakeText = Callable[[dict[str, Any], int, int, Another], dict[str, Any]]


class SeededDataset(SafeDataset):
    """A dataset whose samples know the epoch they are seen in.

    Args:
        streams: The streams.
        seed: Seed of everything random about a sample.
        **kwargs: Passed to SafeDataset.
    """

    def __init__(self, streams: Sequence[VerifiedStream], seed: int, **kwargs: Any) -> None:
        super().__init__(streams=streams, **kwargs)
        self.seed = seed

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
        """Number of samples and shards, and a hash of their content, of the images' where they have sidecars."""
        contents = [stream.content for stream in self.streams if isinstance(stream, VerifiedStream)]
        return {'samples': self.num_samples, 'shards': self.num_shards,
                'content': xxhash.xxh64(' '.join(contents)).hexdigest()}

    def stream_of(self, at: int) -> int:
        """Index of the stream that sample `at` comes from."""
        return int(self.stream_per_shard[self.spanner[at][0]])

    def sample_seed(self, sample: dict[str, Any]) -> int:
        """Seed of this sample in this epoch."""
        return sample_seed(self.seed, self.epoch, sample[SAMPLE_ID])


class TextDataset(SeededDataset):
    """Samples of stage 1, made into what a batch needs each time they are seen.

    Args:
        streams: Caption, text or image datasets.
        make: Gives what goes into a batch, besides a sample's position and its id.
        **kwargs: Passed to SeededDataset.
    """

    def __init__(self, streams: Sequence[VerifiedStream], make: MakeText, **kwargs: Any) -> None:
        super().__init__(streams, **kwargs)
        self.make = make

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        made = self.make(sample, self.stream_of(at), self.sample_seed(sample), partial(self._another, at))
        return {'index': at, 'sample_id': sample[SAMPLE_ID], **made}

    def _another(self, at: int, seed: int) -> Optional[dict[str, Any]]:
        """Another sample of the shard of sample `at`, all of them alike; that shard is here, and others may not be."""
        shard, place = map(int, self.spanner[at])
        size = int(self.samples_per_shard[shard])
        if size == 1:
            return None
        other = (place + 1 + xxhash.xxh64_intdigest('another', seed=seed) % (size - 1)) % size
        return super().__getitem__(at - place + other)


def streaming_dataset(data: DataSpec) -> StreamingDataset:
    """The dataset behind a loader that `build_loader` made."""
    assert isinstance(data.dataloader, StreamingDataLoader) and isinstance(data.dataloader.dataset, StreamingDataset)
    return data.dataloader.dataset


def device_batch_size(global_batch_size: int, key: str) -> int:
    """This rank's share of a global batch.

    Raises:
        ConfigError: The ranks cannot share it evenly.
    """
    world = dist.get_world_size()
    if global_batch_size % world:
        raise ConfigError(f'{key}: {global_batch_size} is not divisible by the number of ranks, {world}')
    return global_batch_size // world


def stream_arguments(name: str, stream: StreamConfig, key: str) -> dict[str, Any]:
    """Keyword arguments of a Stream; checks that a dataset without remote is there.

    Raises:
        ConfigError: The dataset is missing.
    """
    if stream.remote is None and not Path(stream.local, 'index.json').is_file():
        raise ConfigError(f'{key}.streams.{name}.local: there is no MDS dataset in {stream.local}')
    weights = {k: v for k in ('proportion', 'repeat') if (v := getattr(stream, k)) is not None}
    return {'local': stream.local, 'remote': stream.remote, **weights}


def all_caption_keys(name: str, stream: StreamConfig, key: str, setting: str) -> list[str]:
    """Every caption key of a dataset, where a setting that would name some is left out.

    Args:
        name: Of the dataset.
        stream: Where it is.
        key: Where the dataset's group stands in the configuration.
        setting: Which setting is left out, for messages.

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


def count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Tokens of a batch, padded or packed, and of those the ones that a loss is computed on, for Composer."""
    total = sum(int(batch[side + _MASK].sum()) if side + _MASK in batch else batch[side + _IDS].numel()
                for side in text_sides(batch))
    return {'total': total, 'loss_generating': int((batch['labels'] >= 0).sum()) if 'labels' in batch else total}


def build_loader(
    make_dataset: Callable[..., SeededDataset],
    config: LoaderConfig,
    streams: Mapping[str, StreamConfig],
    global_batch_size: int,
    train: bool,
    key: str,
    collate_fn: Optional[Callable[[list[Any]], Any]] = None,
    batching_method: str = 'random',
    **data_spec: Any,
) -> DataSpec:
    """Dataset -> loader of this rank's batches.

    Args:
        make_dataset: Takes the StreamingDataset arguments.
        config: Order and workers.
        streams: The configured streams.
        global_batch_size: Samples per step over all ranks.
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
            sidecars = getattr(stream, 'embeddings', {}).values()
            if None in (stream.remote, *(sidecar.remote for sidecar in sidecars)):
                raise ConfigError(f'{key}.cache_limit: dataset {name} has no remote, and the limit would delete it')
    batch_size = device_batch_size(global_batch_size, 'global_train_batch_size' if train else 'global_eval_batch_size')
    dataset = make_dataset(
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
    for name, stream in zip(streams, dataset.streams):
        if batching_method == 'per_stream' and train and int(stream.choose) < global_batch_size:
            raise ConfigError(f'{key}.streams.{name}: an epoch takes {stream.choose} samples of it, expected as many '
                              f'as one global batch has, {global_batch_size}, since that comes from one dataset; '
                              f'repeat it, or leave it out by {key}.streams.{name}=null')
    # Composer has begun to use the GPU before any loader is made.
    pinned = torch.cuda.is_initialized()
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        drop_last=train,
        collate_fn=collate_fn,
        persistent_workers=train and config.num_workers > 0,
        # Composer's copies to the GPU are asynchronous if what they read is pinned.
        pin_memory=pinned,
        worker_init_fn=partial(_end_with_rank, os.getpid()),
        # Its own generator: drawing the workers' seed from the global one would shift dropout when a run resumes.
        generator=torch.Generator().manual_seed(config.shuffle_seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']), **data_spec)


def _end_with_rank(rank: int, worker: int) -> None:
    """Ends a worker soon after its rank was killed, also one that waits for other workers.

    PyTorch's own watch is kept only between two samples: a worker that waits at Streaming's barrier for the workers of
    a killed rank would wait there for ever, and keep its memory.

    Args:
        rank: Process id of the rank.
        worker: Its number, which PyTorch passes.
    """
    def watch() -> None:
        while os.getppid() == rank:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name=f'end_with_rank_{worker}', daemon=True).start()


def build_text_loader(
    make: MakeText,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    columns: Sequence[Sequence[str]],
    config: CaptionDataConfig,
    global_batch_size: int,
    seed: int,
    train: bool,
    key: str,
    batching_method: str = 'random',
) -> DataSpec:
    """Loader of stage 1's batches, its streams' columns checked.

    Args:
        make: As for `TextDataset`.
        collate: What it made -> batch, besides positions and ids.
        columns: The columns that are read from each stream.
        config: Streams, order and workers.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of everything random about a sample.
        train: As for `build_loader`; microbatches are then of texts of similar length, without padding.
        key: Where `config` stands in the configuration.
        batching_method: As for `build_loader`.
    """
    streams = []
    for (name, stream), needed in zip(config.streams.items(), columns):
        arguments = stream_arguments(name, stream, key)
        if stream.remote is None:
            check_dataset(stream.local, [SAMPLE_ID, *needed])
        streams.append(VerifiedStream(**arguments))

    def collate_all(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {'index': torch.tensor([sample['index'] for sample in samples]),
                'sample_id': [sample['sample_id'] for sample in samples], **collate(samples)}

    return build_loader(
        lambda **kwargs: TextDataset(streams, make, seed=seed, **kwargs), config, config.streams,
        global_batch_size, train, key, collate_all, batching_method, split_batch=split_packed if train else None,
        get_num_tokens_in_batch=count_tokens)


def split_packed(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """`split_by_length`, after which the texts of each part are in one row (`pack_sides`)."""
    return [pack_sides(part, [n for side in text_sides(part) for n in part[side + _MASK].sum(1).tolist()])
            for part in split_by_length(batch, microbatch_size)]


def pack_sides(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """A batch of stage 1 with all its texts in one row, as `pack` says.

    Args:
        batch: Each side's texts padded.
        lengths: Tokens of each text, one side's after the other's in the order in which the batch has them.
    """
    sides = text_sides(batch)
    names = [name.removeprefix(sides[0]) for name, value in batch.items()
             if name.startswith(sides[0]) and isinstance(value, torch.Tensor) and value.ndim == 2]
    longest = max(batch[side + _MASK].shape[1] for side in sides)
    texts = {name: torch.cat([F.pad(batch[side + name], (0, longest - batch[side + name].shape[1])) for side in sides])
             for name in names if name != _MASK}
    padded = {side + name for side in sides for name in names}
    packed = pack(texts, lengths)
    if torch.cuda.is_initialized():  # of pinned memory, copies to the GPU are asynchronous
        packed = {name: torch.empty_like(value, pin_memory=True).copy_(value) if isinstance(value, torch.Tensor)
                  else value for name, value in packed.items()}
    return {**{name: value for name, value in batch.items() if name not in padded}, **packed}


def text_sides(batch: dict[str, Any]) -> list[str]:
    """Prefixes of the texts in a batch: ``query_``, ``positive_``, … or an empty one, also if all are packed."""
    return [key.removesuffix(_IDS) for key in batch if key.endswith(_IDS)]


def split_by_length(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch, each side's texts in the order of their length, and cut the padding that a part does not need.

    A side's tensors stay together.  Different sides are ordered independently, so a part holds texts of different
    samples: fit for a loss on each text by itself, or for `GradCache`, whose loss is that of the whole batch.  A batch
    that is not larger than a microbatch stays as it is.

    Args:
        batch: Tensors ``(B,)`` and ``(B, T)`` and lists of length B; each text side has an ``attention_mask``, padded
            on the right.
        microbatch_size: Samples per part; the last may be smaller.
    """
    n = len(batch['index'])
    if n <= microbatch_size:
        return [batch]
    sides = text_sides(batch)
    order = {side: batch[side + _MASK].sum(1).argsort(descending=True, stable=True) for side in sides}
    parts: list[dict[str, Any]] = []
    for start in range(0, n, microbatch_size):
        rows = {side: order[side][start:start + microbatch_size] for side in sides}
        length = {side: int(batch[side + _MASK][rows[side]].sum(1).max()) for side in sides}
        part = {}
        for key, value in batch.items():
            side = max((side for side in sides if key.startswith(side)), key=len, default=None)
            if side is None:
                part[key] = value[start:start + microbatch_size]
            elif isinstance(value, list):
                part[key] = [value[row] for row in rows[side].tolist()]
            else:
                part[key] = value[rows[side]] if value.ndim == 1 else value[rows[side], :length[side]]
        parts.append(part)
    return parts
