# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a run will read, from the datasets' indexes: its own streams are asked, but no shard is.

But for the length of texts, which a look into the first shard tells, if that is there.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, TypeVar, Union

import numpy as np
from streaming import Stream
from streaming.base.format.base.reader import Reader

from llm2clip.config import (
    CaptionDataConfig,
    CaptionStreamConfig,
    DatasetConfig,
    ImageDataConfig,
    InheritanceDataConfig,
)
from llm2clip.data.caption_pairs import pairs_of_streams
from llm2clip.data.caption_targets import target_stream, target_streams
from llm2clip.data.image_embeddings import paired_stream, stream_mix
from llm2clip.data.loader import stream_arguments
from llm2clip.data.masked_texts import texts_of_streams
from llm2clip.data.schema import SAMPLE_ID, caption_column, caption_keys, check_columns, embedding_dim
from llm2clip.data.streams.paired_stream import PairedReader, columns_of
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.teacher.sidecars import common_teacher

__all__ = ['DataPlan', 'DatasetPlan', 'plan_images', 'plan_sources', 'plan_targets', 'plan_texts']

T = TypeVar('T', bound=DatasetConfig)


@dataclass
class DatasetPlan:
    """One stream of a training."""

    name: str
    samples: int = 0
    size: int = 0
    """Bytes, decompressed."""
    largest_shard: int = 0
    """Bytes, those of its sidecars included."""
    captions: dict[str, float] = field(default_factory=dict)
    """Caption key, or direction, -> share of the samples that draw it."""
    drawn: int = 0
    """Samples per epoch."""
    sidecars: dict[str, int] = field(default_factory=dict)
    """Teacher's name -> bytes."""
    shards: int = 0
    texts: int = 0
    """Captions of all samples, absent ones included."""
    characters: float = 0.0
    """Of a text, on average; 0 where no shard is there yet."""


@dataclass
class DataPlan:
    """All of them."""

    datasets: list[DatasetPlan] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is wrong with them."""
    llm_embed_dim: int = 0
    """Width of the teachers' vectors, together; 0 without sidecars."""
    embed_dim: int = 0
    """Width of the targets of inheritance."""
    characters: float = 0.0
    """Of a text, on average over what is drawn; 0 where it is not known."""


def plan_images(config: ImageDataConfig, key: str, online: bool) -> DataPlan:
    """Stage 2's streams."""
    plan = DataPlan()
    with tempfile.TemporaryDirectory() as scratch:

        def open_stream(name: str) -> tuple[VerifiedStream, Mapping[str, float]]:
            stream, mix = config.streams[name], stream_mix(config, name, key)
            moved = dataclasses.replace(_in(scratch, stream), embeddings={
                teacher: _in(scratch, sidecar) for teacher, sidecar in stream.embeddings.items()})
            return paired_stream(name, moved, config.teachers, list(mix), key, online), mix

        opened = _open(plan, config, open_stream, key)
        _add_sidecars(plan, opened, {name: config.teachers or list(stream.embeddings)
                                     for name, stream in config.streams.items()}, key)
    return plan


def plan_targets(config: InheritanceDataConfig, key: str) -> DataPlan:
    """Inheritance's streams, whose targets count as the dataset, beside which the teachers' vectors lie."""
    plan = DataPlan()
    with _collected(plan, key), tempfile.TemporaryDirectory() as scratch:
        streams = target_streams(config, key)

        def open_stream(name: str) -> tuple[VerifiedStream, Mapping[str, float]]:
            moved = dataclasses.replace(_in(scratch, streams[name]), embeddings={
                teacher: _in(scratch, sidecar) for teacher, sidecar in streams[name].embeddings.items()})
            return target_stream(name, moved, config, key)

        opened = _open(plan, config, open_stream, key)
        _add_sidecars(plan, opened, {name: list(stream.embeddings) for name, stream in streams.items()}, key)
        for _, (reader, *_) in opened[:1]:
            assert isinstance(reader, PairedReader)
            plan.embed_dim = embedding_dim(columns_of(reader.images))
    return plan


def _add_sidecars(
    plan: DataPlan, opened: Sequence[tuple[VerifiedStream, list[Reader]]], teachers: Mapping[str, Sequence[str]],
    key: str,
) -> None:
    """Add the sizes of sidecars, dataset -> their teachers, and the width of their vectors."""
    for dataset, (_, readers) in zip(plan.datasets, opened):
        shards = [reader.sidecars for reader in readers if isinstance(reader, PairedReader)]
        sizes = np.array([[reader.get_raw_size() for reader in shard] for shard in shards])
        dataset.sidecars = dict(zip(teachers[dataset.name], sizes.sum(0).tolist()))
    if any(dataset.sidecars for dataset in plan.datasets):
        with _collected(plan, key):
            plan.llm_embed_dim = common_teacher([(stream, readers[0]) for stream, readers in opened]).llm_embed_dim


def plan_texts(config: CaptionDataConfig, key: str, mntp: bool, train: bool = True) -> tuple[DataPlan, bool]:
    """Stage 1's streams, and whether some pair has a hard negative.

    Args:
        config: The streams.
        key: Where `config` stands in the configuration.
        mntp: Single texts and not pairs.
        train: As for the loaders.
    """
    negative = False
    if mntp:
        mixes = texts_of_streams(config, key)
        columns = [[caption_column(caption) for caption in mix] for mix in mixes]
    else:
        pairs, columns = pairs_of_streams(config, train, key)
        mixes = [{f'{"|".join(pair.query)} → {"|".join(pair.positive or ["itself"])}': pair.weight
                  for pair in of_stream} for of_stream in pairs]
        negative = any(pair.has_negative for of_stream in pairs for pair in of_stream)
    return _plan_columns(config.streams, dict(zip(config.streams, zip(mixes, columns))), config, key), negative


def plan_sources(datasets: Mapping[str, DatasetConfig], key: str) -> DataPlan:
    """Datasets whose captions are all embedded."""
    streams = {name: CaptionStreamConfig(dataset.local, dataset.remote) for name, dataset in datasets.items()}
    return _plan_columns(streams, dict.fromkeys(datasets, ({}, None)), CaptionDataConfig(streams=streams), key)


def _plan_columns(
    streams: Mapping[str, CaptionStreamConfig], chosen: Mapping[str, tuple[Mapping[str, float], Optional[list[str]]]],
    loader: CaptionDataConfig, key: str,
) -> DataPlan:
    """Streams of which some columns are read.

    Args:
        streams: The streams.
        chosen: Stream -> what is drawn from it with which weight, and its columns; None, all captions.
        loader: Their loader's.
        key: Where `streams` stand in the configuration.
    """
    plan = DataPlan()
    with tempfile.TemporaryDirectory() as scratch:

        def open_stream(name: str) -> tuple[VerifiedStream, Mapping[str, float]]:
            return VerifiedStream(**stream_arguments(name, _in(scratch, streams[name]), key)), chosen[name][0]

        opened = _open(plan, loader, open_stream, key)
        for dataset, (_, readers) in zip(plan.datasets, opened):
            with _collected(plan, f'{key}.streams.{dataset.name}'):
                there = columns_of(readers[0])
                columns = chosen[dataset.name][1] or [caption_column(caption) for caption in caption_keys(there)]
                check_columns(there, [SAMPLE_ID, *columns], dataset.name)
                dataset.texts = dataset.samples * len(columns)
                dataset.characters = _mean_characters(readers[0], columns)
    known = [dataset for dataset in plan.datasets if dataset.characters]
    if known:
        plan.characters = float(np.average([dataset.characters for dataset in known],
                                           weights=[dataset.drawn or 1 for dataset in known]))
    return plan


def _mean_characters(shard: Reader, columns: Sequence[str], samples: int = 200) -> float:
    """Of the texts in the first samples of a shard, or 0 if it is not there as it is stored."""
    raw, _ = shard.file_pairs[0]
    if not Path(shard.dirname, shard.split or '', raw.basename).is_file():
        return 0.0
    texts = [shard[i][column].strip() for i in range(min(samples, len(shard))) for column in columns]
    return float(np.mean([len(text) for text in texts if text] or [0.0]))


def _open(
    plan: DataPlan, config: Union[ImageDataConfig, CaptionDataConfig, InheritanceDataConfig],
    open_stream: Callable[[str], tuple[VerifiedStream, Mapping[str, float]]], key: str,
) -> list[tuple[VerifiedStream, list[Reader]]]:
    """Add the datasets that can be had, and what is wrong with the others."""
    opened = []
    for name in config.streams:
        with _collected(plan, f'{key}.streams.{name}'):
            stream, mix = open_stream(name)
            readers = stream.open(config.download_retry, config.download_timeout)
            sizes = [reader.get_raw_size() for reader in readers]
            images = [reader.images if isinstance(reader, PairedReader) else reader for reader in readers]
            total = sum(mix.values())
            plan.datasets.append(DatasetPlan(
                name, sum(map(len, readers)), sum(image.get_raw_size() for image in images), max(sizes),
                {caption: weight / total for caption, weight in mix.items() if weight}, shards=len(readers)))
            opened.append((stream, readers))
    if opened:
        samples = np.array([dataset.samples for dataset in plan.datasets])
        Stream.apply_weights([stream for stream, _ in opened], samples, config.epoch_size and int(config.epoch_size),
                             config.shuffle_seed)
        for dataset, (stream, _) in zip(plan.datasets, opened):
            dataset.drawn = int(stream.choose)
    return opened


def _in(scratch: str, dataset: T) -> T:
    """The same dataset with a cache of its own, if it has one: the run's stays as it is."""
    return dataset if dataset.remote is None else dataclasses.replace(dataset, local=tempfile.mkdtemp(dir=scratch))


@contextmanager
def _collected(plan: DataPlan, where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ShardError, ValueError) as error:
        text = str(error)
        plan.problems.append(text if text.startswith(where) else f'{where}: {text}')
