# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The files of a sidecar while it is written, by several ranks or machines: shards, and an index when all are there."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer.utils import dist
from streaming import MDSWriter

from llm2clip.config import ConfigError, DatasetConfig
from llm2clip.data.schema import INDEX, TEACHER_FILE, check_shard, first_shards
from llm2clip.files import read_json, writing
from llm2clip.folders import OutputFolder
from llm2clip.teacher.fingerprint import TeacherRecord

__all__ = ['Sidecar', 'begin_sidecar', 'finish_sidecar', 'write_shard']


@dataclass(frozen=True)
class Sidecar:
    """What is written for one dataset."""

    dataset: DatasetConfig
    """The image or caption dataset."""
    out: OutputFolder
    """Where the sidecar goes."""
    storage: str = 'float16'
    """``float16`` or ``int8``."""
    normalize: bool = False
    """Store vectors of length 1."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the vectors for the fingerprint, such as the precision."""

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.out.local.name


def begin_sidecar(out: OutputFolder, record: TeacherRecord, index: dict[str, Any]) -> list[int]:
    """Claim the folder for this dataset and teacher; returns the shards that are not there yet.

    What it was claimed for may be the beginning of this dataset: the shards that are there then are those of its first
    ones, and the others come after them.
    """
    todo: list[list[int]] = [[]]
    if dist.get_global_rank() == 0:
        out.local.mkdir(parents=True, exist_ok=True)
        if not out.fetch(TEACHER_FILE):
            if out.fetch(INDEX):
                raise ConfigError(f'out: {out.local} holds a dataset that is no sidecar, expected an empty folder or a '
                                  'sidecar')
            out.commit(TEACHER_FILE, record.to_text())
        else:
            found = TeacherRecord.read(out.local)
            covered = first_shards(index, found.about.get('dataset'))
            if covered is not None:
                found.about['dataset'] = record.about['dataset']
            if (differing := found.difference(record)) is not None:
                raise ValueError(f'{out.local} was begun for another dataset or teacher: {differing}; remove it to '
                                 'extract again')
            if covered is not None and covered < len(index['shards']):
                out.commit(TEACHER_FILE, record.to_text())
        todo = [[k for k in range(len(index['shards'])) if not out.fetch(_piece(k))]]
    dist.broadcast_object_list(todo)
    out.local.mkdir(parents=True, exist_ok=True)
    return todo[0]


def write_shard(out: OutputFolder, k: int, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Write one shard; its index entry, which says that it is done, comes last."""
    name = f'shard.{k:05}.mds'
    partial = out.local / f'{name}.tmp.{os.getpid()}'
    mds = MDSWriter(out=str(partial), columns=columns, hashes=['xxh64'], size_limit=None)
    with writing(out.local / name), mds as writer:
        for row in rows:
            writer.write(row)
    entry, = read_json(partial / INDEX, dict)['shards']
    os.replace(partial / entry['raw_data']['basename'], out.local / name)
    entry['raw_data']['basename'] = name
    shutil.rmtree(partial)
    out.publish(name)
    out.commit(_piece(k), json.dumps(entry))


def finish_sidecar(out: OutputFolder, n_shards: int) -> None:
    """Write the index from the shards' entries."""
    for k in range(n_shards):
        if not out.fetch(_piece(k)):
            raise FileNotFoundError(f'{Path(out.local, _piece(k))}, which another machine has written, is not here: '
                                    'machines that do not share the folder need out_remote')
    entries = [read_json(out.local / _piece(k), dict) for k in range(n_shards)]
    for k, entry in enumerate(entries):
        check_shard(entry, f'{out.local / _piece(k)}')
    out.commit(INDEX, json.dumps({'version': 2, 'shards': entries}, sort_keys=True))


def _piece(k: int) -> str:
    """The index entry of a finished shard."""
    return f'shard.{k:05}.json'
