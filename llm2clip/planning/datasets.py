# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data of a planned run, from the datasets' indexes and through the run's own streams.

Only text lengths come from the first shard, if it is on disk.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from composer.utils import dist
from streaming import Stream
from streaming.base.format.base.reader import Reader

from llm2clip.config import (
    CaptionDataConfig,
    CaptionStreamConfig,
    ExtractConfig,
    ImageDataConfig,
    InheritanceDataConfig,
    Stage1Config,
)
from llm2clip.data.caption_pair_dataset import drop_single_captions, pair_columns, stream_pairs
from llm2clip.data.image_text_dataset import caption_mix, paired_stream
from llm2clip.data.inheritance_dataset import target_mix, target_stream, target_streams
from llm2clip.data.loader import stream_arguments
from llm2clip.data.masked_text_dataset import text_mixes
from llm2clip.data.schema import CAPTION, SAMPLE_ID, caption_keys, columns_of, embedding_dim
from llm2clip.data.streams.paired_stream import PairedReader
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import under
from llm2clip.planning.plan import DatasetPlan, Plan
from llm2clip.teacher.fingerprint import common_teacher

Loader = Union[ImageDataConfig, CaptionDataConfig, InheritanceDataConfig]


@contextmanager
def collected(errors: list[str], where: str = '') -> Iterator[None]:
    """Append an error of the block to `errors`, with the key `where` in front."""
    try:
        yield
    except (OSError, ShardError, ValueError) as error:
        text = str(error)
        if not text.startswith(where):
            text = f'{where}: {text}'
        errors.append(text)


def plan_data(config: Any, key: str) -> Plan:
    """Return a plan of the data that a recipe reads by `train_data`, `eval_data` or, for an extraction, `datasets`.

    The plan has no data if `plan_samples` is set.  The dataset of inheritance is that of the targets, and an
    extraction reads all captions.
    """
    loader: Any = getattr(config, key)
    plan = Plan(config, dist.get_world_size())
    if config.plan_samples is not None:
        return plan
    if isinstance(loader, ImageDataConfig):
        in_loop = not config.reads_vectors
        _read(plan, loader.streams, loader, key,
              lambda stream: paired_stream(stream, loader, caption_mix(stream, loader), in_loop=in_loop))
        return plan
    if isinstance(loader, InheritanceDataConfig):
        with collected(plan.errors, key):
            with under(key):
                streams = target_streams(loader)
            _read(plan, streams, loader, key,
                  lambda stream: target_stream(stream, loader, target_mix(stream, loader)))
        return plan
    is_train = key == 'train_data'
    is_mntp = isinstance(config, Stage1Config) and config.objective == 'mntp'
    if isinstance(config, ExtractConfig):
        loader = CaptionDataConfig(streams={
            name: CaptionStreamConfig(dataset.local, dataset.remote) for name, dataset in loader.items()})
        columns = dict.fromkeys(loader.streams)
    elif is_mntp and is_train:
        with under(key):
            mixes = text_mixes(loader)
        columns = {name: [CAPTION + caption for caption in mix] for name, mix in mixes.items()}
    elif is_mntp:
        return plan
    else:
        with under(key):
            if not is_train:
                loader = drop_single_captions(loader)
                if loader is None:
                    return plan
            pairs = stream_pairs(loader, train=is_train)
        columns = {name: pair_columns(pairs[name]) for name in pairs}
        plan.negative = any(pair.has_negative for pair in chain.from_iterable(pairs.values()))
    _read(plan, loader.streams, loader, key,
          lambda stream: VerifiedStream(**stream_arguments(stream)), columns)
    return plan


def _read(
    plan: Plan, streams: Mapping[str, Any], config: Loader, key: str,
    open_stream: Callable[[Any], VerifiedStream],
    columns: Optional[Mapping[str, Optional[Sequence[str]]]] = None,
) -> None:
    """Add the datasets that can be opened, and errors; `columns` are the text columns of each (None: all captions)."""
    opened: list[tuple[VerifiedStream, Reader]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, configured in streams.items():
            with collected(plan.errors, f'{key}.streams.{name}'), under(f'{key}.streams.{name}'):
                stream = open_stream(_with_caches_in(scratch, configured))
                shards = stream.open(config.download_retry, config.download_timeout)
                dataset = _sizes(name, shards)
                plan.datasets.append(dataset)
                opened.append((stream, shards[0]))
                if columns is not None:
                    _add_texts(dataset, shards[0], columns[name])
        if not opened:
            return
        if any(dataset.embeddings for dataset in plan.datasets):
            with collected(plan.errors, key):
                plan.llm_embed_dim = common_teacher(opened).llm_embed_dim
        first_shard = opened[0][1]
        if isinstance(config, InheritanceDataConfig) and isinstance(first_shard, PairedReader):
            plan.embed_dim = embedding_dim(first_shard.images)
    samples = np.array([dataset.samples for dataset in plan.datasets])
    epoch_size = int(config.epoch_size) if config.epoch_size else None
    Stream.apply_weights([stream for stream, _ in opened], samples, epoch_size, config.shuffle_seed)
    for dataset, (stream, _) in zip(plan.datasets, opened):
        dataset.epoch_samples = int(stream.choose)
    with_texts = [dataset for dataset in plan.datasets if dataset.characters]
    if with_texts:
        plan.characters = float(np.average([dataset.characters for dataset in with_texts],
                                           weights=[dataset.epoch_samples or 1 for dataset in with_texts]))


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


def _add_texts(dataset: DatasetPlan, shard: Reader, columns: Optional[Sequence[str]]) -> None:
    """Count the texts of a dataset, and the mean number of characters in its first shard."""
    columns = columns or [CAPTION + caption for caption in caption_keys(columns_of(shard))]
    columns_of(shard, [SAMPLE_ID, *columns], dataset.name)
    dataset.texts = dataset.samples * len(columns)
    raw, _ = shard.file_pairs[0]
    if Path(shard.dirname, shard.split or '', raw.basename).is_file():
        lengths: list[int] = []
        for i in range(min(200, len(shard))):
            sample = shard[i]
            texts = [sample[column].strip() for column in columns]
            lengths += [len(text) for text in texts if text]
        if lengths:
            dataset.characters = float(np.mean(lengths))


def _with_caches_in(scratch: str, dataset: Any) -> Any:
    """Return the dataset with temporary caches in place of its own, so that the run's caches stay unchanged."""
    changes: dict[str, Any] = {}
    if dataset.remote is not None:
        changes['local'] = tempfile.mkdtemp(dir=scratch)
    embeddings = getattr(dataset, 'embeddings', {})
    if embeddings:
        changes['embeddings'] = {name: _with_caches_in(scratch, vectors) for name, vectors in embeddings.items()}
    return dataclasses.replace(dataset, **changes)
