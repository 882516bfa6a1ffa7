# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a training will read, from the datasets' indexes alone: its own streams are asked, but no shard is."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, Union

import numpy as np
from streaming import Stream
from streaming.base.format.base.reader import Reader

from llm2clip.config import CaptionDataConfig, DatasetConfig, ImageDataConfig
from llm2clip.data.image_embeddings import paired_stream, stream_mix
from llm2clip.data.loader import stream_arguments
from llm2clip.data.schema import SAMPLE_ID, check_columns
from llm2clip.data.streams.paired_stream import PairedReader, columns_of
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.teacher.sidecars import common_teacher

__all__ = ['DataPlan', 'DatasetPlan', 'plan_images', 'plan_texts']

T = TypeVar('T', bound=DatasetConfig)


@dataclass
class DatasetPlan:
    """One stream of a training."""

    name: str
    samples: int
    size: int
    """Bytes, decompressed."""
    largest_shard: int
    """Bytes, those of its sidecars included."""
    captions: dict[str, float]
    """Caption key, or direction, -> share of the samples that draw it."""
    drawn: int = 0
    """Samples per epoch."""
    sidecars: dict[str, int] = field(default_factory=dict)
    """Teacher's name -> bytes."""


@dataclass
class DataPlan:
    """All of them."""

    datasets: list[DatasetPlan] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is wrong with them."""
    llm_embed_dim: int = 0
    """Width of the teachers' vectors, together; 0 without sidecars."""


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
        for dataset, (_, readers) in zip(plan.datasets, opened):
            teachers = config.teachers or list(config.streams[dataset.name].embeddings)
            shards = [reader.sidecars for reader in readers if isinstance(reader, PairedReader)]
            sizes = np.array([[reader.get_raw_size() for reader in shard] for shard in shards])
            dataset.sidecars = dict(zip(teachers, sizes.sum(0).tolist()))
        if opened and not online:
            with _collected(plan, key):
                plan.llm_embed_dim = common_teacher([(stream, readers[0]) for stream, readers in opened]).llm_embed_dim
    return plan


def plan_texts(
    config: CaptionDataConfig, mixes: Sequence[Mapping[str, float]], columns: Sequence[Sequence[str]], key: str
) -> DataPlan:
    """Stage 1's streams.

    Args:
        config: The streams.
        mixes: What is drawn from each -> weight.
        columns: Which columns that takes.
        key: Where `config` stands in the configuration.
    """
    plan, chosen = DataPlan(), dict(zip(config.streams, zip(mixes, columns)))
    with tempfile.TemporaryDirectory() as scratch:

        def open_stream(name: str) -> tuple[VerifiedStream, Mapping[str, float]]:
            moved = _in(scratch, config.streams[name])
            return VerifiedStream(**stream_arguments(name, moved, key)), chosen[name][0]

        opened = _open(plan, config, open_stream, key)
        for dataset, (_, readers) in zip(plan.datasets, opened):
            with _collected(plan, f'{key}.streams.{dataset.name}'):
                check_columns(columns_of(readers[0]), [SAMPLE_ID, *chosen[dataset.name][1]], dataset.name)
    return plan


def _open(
    plan: DataPlan, config: Union[ImageDataConfig, CaptionDataConfig],
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
                {caption: weight / total for caption, weight in mix.items() if weight}))
            opened.append((stream, readers))
    if opened:
        samples = np.array([dataset.samples for dataset in plan.datasets])
        Stream.apply_weights([stream for stream, _ in opened], samples, None, config.shuffle_seed)
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
