# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data of a planned run, from the datasets' indexes and through the run's own streams.

Only text lengths come from the first shard, if it is on disk.  They are read even for data whose size
`plan_samples` sets.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from streaming import Stream
from streaming.base.format.base.reader import Reader

from llm2clip.config import (
    CaptionDataConfig,
    CaptionStreamConfig,
    DatasetConfig,
    ImageDataConfig,
    InheritanceConfig,
    InheritanceDataConfig,
    Stage1Config,
    Stage2Config,
)
from llm2clip.data.caption_pair_dataset import drop_single_captions, pair_columns, stream_pairs
from llm2clip.data.image_text_dataset import caption_mix, paired_stream
from llm2clip.data.inheritance_dataset import target_mix, target_stream, target_streams
from llm2clip.data.loader import stream_arguments
from llm2clip.data.masked_text_dataset import text_mixes
from llm2clip.data.schema import CAPTION, INDEX, SAMPLE_ID, caption_keys, columns_of, embedding_dim
from llm2clip.data.streams.paired_stream import PairedReader
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import under
from llm2clip.planning.plan import DatasetPlan, Plan
from llm2clip.teacher.fingerprint import common_teacher

Loader = Union[ImageDataConfig, CaptionDataConfig, InheritanceDataConfig]


@contextmanager
def collect_errors(errors: list[str], key: str = '') -> Iterator[None]:
    """Append an error of the block to `errors`, with `key` in front."""
    try:
        yield
    except (OSError, ShardError, ValueError) as error:
        text = str(error)
        if not text.startswith(key):
            text = f'{key}: {text}'
        errors.append(text)


def add_images(plan: Plan, config: Stage2Config, key: str) -> None:
    """Add the images and text embeddings that stage 2 reads by `key`, ``train_data`` or ``eval_data``."""
    loader: Any = getattr(config, key)
    captions = not config.reads_vectors

    def columns(name: str, stream: Any) -> dict[str, float]:
        return _captions(caption_mix(stream, loader))

    _add_datasets(plan, loader.streams, loader, key,
                  lambda stream: paired_stream(stream, loader, caption_mix(stream, loader), in_loop=captions),
                  columns if captions else None)


def add_targets(plan: Plan, config: InheritanceConfig, key: str) -> None:
    """Add the embeddings that inheritance reads by `key`, ``train_data`` or ``eval_data``."""
    loader: Any = getattr(config, key)
    with collect_errors(plan.errors, key):
        with under(key):
            streams = target_streams(loader)
        shards: Any = _add_datasets(plan, streams, loader, key,
                                    lambda stream: target_stream(stream, loader, target_mix(stream, loader)))
        if shards:
            plan.embed_dim = embedding_dim(shards[0].images)


def add_captions(plan: Plan, config: Stage1Config, key: str) -> None:
    """Add the captions that stage 1 reads by `key`, ``train_data`` or ``eval_data``."""
    loader: Any = getattr(config, key)
    is_train = key == 'train_data'
    with under(key):
        if config.objective == 'mntp':
            mixes = text_mixes(loader)
            columns = {name: _captions(mix) for name, mix in mixes.items()}
        else:
            if not is_train:
                loader = drop_single_captions(loader)
                if loader is None:
                    return
            pairs = stream_pairs(loader, train=is_train)
            columns = {name: dict.fromkeys(pair_columns(pairs[name]), 1.0) for name in pairs}
    _add_texts(plan, loader, key, columns)


def add_all(plan: Plan, datasets: Mapping[str, DatasetConfig]) -> None:
    """Add the datasets of an extraction with all their captions."""
    streams = {name: CaptionStreamConfig(dataset.local, dataset.remote) for name, dataset in datasets.items()}
    _add_texts(plan, CaptionDataConfig(streams=streams), 'datasets', {})


def on_disk(datasets: Mapping[str, DatasetConfig]) -> dict[str, Any]:
    """Return the datasets that have an index here and no remote."""
    present: dict[str, DatasetConfig] = {}
    for name, dataset in datasets.items():
        if dataset.remote is None and Path(dataset.local, INDEX).is_file():
            present[name] = dataset
    return present


def _captions(mix: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of captions by their columns."""
    return {CAPTION + caption: weight for caption, weight in mix.items()}


def _add_texts(
    plan: Plan, loader: CaptionDataConfig, key: str, columns: Mapping[str, Mapping[str, float]]
) -> None:
    _add_datasets(plan, loader.streams, loader, key,
                  lambda stream: VerifiedStream(**stream_arguments(stream)),
                  lambda name, stream: columns.get(name, {}))


def _add_datasets(
    plan: Plan, streams: Mapping[str, Any], loader: Loader, key: str,
    open_stream: Callable[[Any], VerifiedStream],
    columns: Optional[Callable[[str, Any], Mapping[str, float]]] = None,
) -> list[Reader]:
    """Add the datasets that can be opened, and the errors of the others; return the first shard of each.

    `columns` returns the text columns of a dataset with their weights; if there are none, all its captions
    are counted.
    """
    opened: list[tuple[VerifiedStream, Reader]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, configured in streams.items():
            stream_key = f'{key}.streams.{name}'
            with collect_errors(plan.errors, stream_key), under(stream_key):
                cached = _with_caches_in(scratch, configured)
                stream = open_stream(cached)
                shards = stream.open(loader.download_retry, loader.download_timeout)
                dataset = _sizes(name, shards)
                plan.datasets.append(dataset)
                opened.append((stream, shards[0]))
                if columns is not None:
                    _count_texts(dataset, shards[0], columns(name, cached))
        if any(dataset.embeddings for dataset in plan.datasets):
            with collect_errors(plan.errors, key):
                plan.llm_embed_dim = common_teacher(opened).llm_embed_dim
    if opened:
        samples = np.array([dataset.samples for dataset in plan.datasets])
        epoch_size = int(loader.epoch_size) if loader.epoch_size else None
        Stream.apply_weights([stream for stream, _ in opened], samples, epoch_size, loader.shuffle_seed)
        for dataset, (stream, _) in zip(plan.datasets, opened):
            dataset.epoch_samples = int(stream.choose)
        characters = np.array([dataset.characters for dataset in plan.datasets])
        drawn = np.array([dataset.epoch_samples for dataset in plan.datasets]) * (characters > 0)
        if drawn.any():
            plan.characters = float(np.average(characters, weights=drawn))
    return [shard for _, shard in opened]


def _sizes(name: str, shards: Sequence[Reader]) -> DatasetPlan:
    """Add up the sizes of a dataset's shards."""
    dataset = DatasetPlan(name, shards=len(shards))
    for shard in shards:
        size = shard.get_raw_size()
        images = shard.images if isinstance(shard, PairedReader) else shard
        dataset.samples += len(shard)
        dataset.size += images.get_raw_size()
        dataset.embeddings += size - images.get_raw_size()
        dataset.largest_shard = max(dataset.largest_shard, size)
    return dataset


def _count_texts(dataset: DatasetPlan, shard: Reader, columns: Mapping[str, float]) -> None:
    """Count the texts of a dataset, and the mean number of characters in its first shard."""
    if isinstance(shard, PairedReader):
        shard = shard.images
    columns = columns or _captions(dict.fromkeys(caption_keys(columns_of(shard)), 1.0))
    columns_of(shard, [SAMPLE_ID, *columns], dataset.name)
    dataset.texts = dataset.samples * len(columns)
    raw, _ = shard.file_pairs[0]
    if Path(shard.dirname, shard.split, raw.basename).is_file():
        characters = drawn = 0.0
        for i in range(min(200, len(shard))):
            sample = shard[i]
            for column, weight in columns.items():
                length = len(sample[column].strip())
                if length:
                    characters += weight * length
                    drawn += weight
        dataset.characters = characters / drawn if drawn else 0.0


def _with_caches_in(scratch: str, dataset: Any) -> Any:
    """Return the dataset with temporary caches in place of its own, so that the run's caches stay
    unchanged."""
    dataset = copy.deepcopy(dataset)
    parts = [dataset, getattr(dataset, 'image_embeddings', None)]
    parts += getattr(dataset, 'embeddings', {}).values()
    for part in parts:
        if part is not None and part.remote is not None:
            part.local = tempfile.mkdtemp(dir=scratch)
    return dataset
