# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a training will read, from the datasets' indexes alone."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from streaming.base.storage import CloudDownloader

from llm2clip.config import ConfigError, DatasetConfig, ImageDataConfig, ImageStreamConfig, StreamConfig
from llm2clip.data.image_embeddings import check_same_teacher
from llm2clip.data.paired_stream import FINGERPRINT_FILE
from llm2clip.data.schema import (
    IMAGE,
    SAMPLE_ID,
    caption_column,
    check_columns,
    dataset_fingerprint,
    embedding_column,
    embedding_dim,
    read_index,
)

__all__ = ['DatasetPlan', 'plan_images', 'plan_texts']

Index = dict[str, Any]


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
    """Samples an epoch."""
    sidecars: dict[str, int] = field(default_factory=dict)
    """Teacher's name -> bytes."""
    llm_embed_dim: int = 0
    """Width of the teachers' vectors, together; 0 without sidecars."""


def plan_images(config: ImageDataConfig, key: str, online: bool) -> tuple[list[DatasetPlan], list[str]]:
    """Stage 2's streams, and what is wrong with them."""
    plans, problems = [], []
    teachers: list[tuple[str, Any]] = []
    for name, stream in config.streams.items():
        where = f'{key}.streams.{name}'
        mix = config.caption_mix if stream.caption_mix is None else stream.caption_mix
        if not (plan := _plan(name, stream, [IMAGE, *map(caption_column, mix)], mix, where, problems)):
            continue
        plans.append(plan)
        chosen = [] if online else config.teachers or list(stream.embeddings)
        if not online and not config.teachers and len(chosen) != 1:
            problems.append(f'{where}.embeddings: there are sidecars of {len(chosen)} teachers; {key}.teachers has to '
                            'say which one to read')
        for teacher in chosen:
            try:
                teachers.append((f'{where}.embeddings.{teacher}', _sidecar(plan, stream, teacher, list(mix))))
            except (ConfigError, OSError, ValueError) as error:
                problems.append(f'{where}.embeddings.{teacher}: {error}')
    for where, teacher in teachers[1:]:
        if len(config.teachers) < 2:
            problems += _problem(where, check_same_teacher, teacher, teachers[0][1], 'the sidecar', teachers[0][0])
    _draw(plans, config.streams)
    return plans, problems


def plan_texts(
    streams: Mapping[str, StreamConfig], mixes: Sequence[Mapping[str, float]], columns: Sequence[Sequence[str]],
    key: str,
) -> tuple[list[DatasetPlan], list[str]]:
    """Stage 1's streams, and what is wrong with them.

    Args:
        streams: The configured ones.
        mixes: What is drawn from each -> weight.
        columns: Which columns that takes.
        key: Where `streams` stands in the configuration.
    """
    plans, problems = [], []
    for (name, stream), mix, needed in zip(streams.items(), mixes, columns):
        if plan := _plan(name, stream, needed, mix, f'{key}.streams.{name}', problems):
            plans.append(plan)
    _draw(plans, streams)
    return plans, problems


def _plan(
    name: str, stream: StreamConfig, columns: Sequence[str], mix: Mapping[str, float], where: str, problems: list[str]
) -> Optional[DatasetPlan]:
    try:
        index = _index(stream)
        check_columns(_columns(index), [SAMPLE_ID, *columns], where)
    except (ConfigError, OSError, ValueError) as error:
        problems.append(f'{where}: {error}')
        return None
    total = sum(mix.values())
    sizes = [shard['raw_data']['bytes'] for shard in index['shards']]
    return DatasetPlan(name, _samples(index), sum(sizes), max(sizes),
                       {caption: weight / total for caption, weight in mix.items() if weight})


def _sidecar(plan: DatasetPlan, stream: ImageStreamConfig, teacher: str, captions: Sequence[str]) -> dict[str, Any]:
    """Add a sidecar to the plan, and return the teacher it is from."""
    if teacher not in stream.embeddings:
        raise ConfigError(f'there is no such sidecar, only {", ".join(stream.embeddings) or "none"}')
    dataset = stream.embeddings[teacher]
    images, index = _index(stream), _index(dataset)
    columns = _columns(index)
    check_columns(columns, [SAMPLE_ID, *map(embedding_column, captions)], dataset.remote or dataset.local)
    fingerprint = json.loads(_file(dataset, FINGERPRINT_FILE))
    if fingerprint['dataset'] != dataset_fingerprint(images):
        raise ConfigError(f'it was made for another dataset, with {_samples(index)} samples')
    sizes = [shard['raw_data']['bytes'] for shard in index['shards']]
    plan.sidecars[teacher] = sum(sizes)
    plan.largest_shard += max(sizes)
    plan.llm_embed_dim += embedding_dim(columns)
    return fingerprint['teacher']


def _draw(plans: Sequence[DatasetPlan], streams: Mapping[str, StreamConfig]) -> None:
    """Samples of an epoch, by Streaming's rules for `repeat` and `proportion`."""
    total = sum(plan.samples for plan in plans)
    shares = sum(streams[plan.name].proportion or 0 for plan in plans)
    for plan in plans:
        stream = streams[plan.name]
        plan.drawn = round(total * stream.proportion / shares) if stream.proportion else \
            int(plan.samples * (1 if stream.repeat is None else stream.repeat))


def _index(dataset: DatasetConfig) -> Index:
    if dataset.remote is None:
        return read_index(dataset.local)
    index = json.loads(_file(dataset, 'index.json'))
    if not index['shards']:
        raise ConfigError(f'the MDS dataset in {dataset.remote} is empty')
    return index


def _file(dataset: DatasetConfig, name: str) -> str:
    """From the cache, or from the remote without filling the cache."""
    path = Path(dataset.local, name)
    if path.is_file() or dataset.remote is None:
        return path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, name)
        CloudDownloader.get(dataset.remote).download(f'{dataset.remote.rstrip("/")}/{name}', str(copy), 60)
        return copy.read_text()


def _samples(index: Index) -> int:
    return sum(shard['samples'] for shard in index['shards'])


def _columns(index: Index) -> dict[str, str]:
    return dict(zip(index['shards'][0]['column_names'], index['shards'][0]['column_encodings']))


def _problem(where: str, check: Any, *args: Any) -> list[str]:
    try:
        check(*args)
    except ValueError as error:
        return [f'{where}: {error}']
    return []
