# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Column names and types of every dataset: the one source of truth.

An image dataset has `sample_id`, `image` and one ``caption.<key>`` per caption; a caption dataset the same without
`image`; a sidecar has `sample_id` and one ``text_embedding.<key>`` per caption, with ``text_embedding_scale.<key>`` if
they are int8.

Every sample has every column.  A caption that a sample does not have is an empty text, and its vector is zero.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Union

import xxhash
from streaming.base.format import reader_from_json

__all__ = [
    'CAPTION', 'EMBEDDING', 'IMAGE', 'SAMPLE_ID', 'SCALE', 'TEACHER_FILE', 'caption_column', 'caption_keys',
    'check_columns', 'check_dataset', 'dataset_fingerprint', 'embedding_column', 'embedding_dim', 'read_columns',
    'read_index', 'read_samples', 'scale_column',
]

SAMPLE_ID = 'sample_id'
IMAGE = 'image'
CAPTION = 'caption.'
EMBEDDING = 'text_embedding.'
SCALE = 'text_embedding_scale.'
TEACHER_FILE = 'teacher.json'
"""Beside a sidecar's shards: the dataset and the teacher that it belongs to."""

_TYPES = {SAMPLE_ID: ('str',), IMAGE: ('bytes',), CAPTION: ('str',), SCALE: ('float32',),
          EMBEDDING: ('ndarray:float16:', 'ndarray:int8:')}


def caption_column(key: str) -> str:
    return CAPTION + key


def embedding_column(key: str) -> str:
    return EMBEDDING + key


def scale_column(key: str) -> str:
    return SCALE + key


def embedding_dim(columns: dict[str, str]) -> int:
    """Width of the vectors of a sidecar with these columns."""
    return next(int(kind.rsplit(':', 1)[1]) for name, kind in columns.items() if name.startswith(EMBEDDING))


def caption_keys(columns: Iterable[str]) -> list[str]:
    """The captions that a dataset with these columns has."""
    return [name.removeprefix(CAPTION) for name in columns if name.startswith(CAPTION)]


def read_index(folder: Union[str, Path]) -> dict[str, Any]:
    """The index of an MDS dataset.

    Raises:
        FileNotFoundError: There is no dataset in `folder`.
        ValueError: It has no shards, or its index is damaged.
    """
    path = Path(folder) / 'index.json'
    if not path.is_file():
        raise FileNotFoundError(f'there is no MDS dataset in {folder}: {path} does not exist')
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is damaged: {error}') from None
    if not index.get('shards'):
        raise ValueError(f'the MDS dataset in {folder} is empty')
    return index


def read_columns(folder: Union[str, Path]) -> dict[str, str]:
    """Column name -> MDS type, as the first shard has them."""
    shard = read_index(folder)['shards'][0]
    return dict(zip(shard['column_names'], shard['column_encodings']))


def check_columns(columns: dict[str, str], required: Sequence[str], where: Union[str, Path]) -> None:
    """Raise a ValueError unless every required column is there with the type that its name stands for."""
    for name in required:
        if name not in columns:
            raise ValueError(f'{where}: column {name!r} is missing; the dataset has {", ".join(sorted(columns))}')
        family = next(prefix for prefix in _TYPES if name.startswith(prefix))
        if not columns[name].startswith(_TYPES[family]):
            raise ValueError(f'{where}: column {name!r} has type {columns[name]!r}, expected '
                             f'{" or ".join(map(repr, _TYPES[family]))}')


def check_dataset(folder: Union[str, Path], required: Sequence[str]) -> dict[str, str]:
    """Columns of the dataset in `folder`, checked."""
    columns = read_columns(folder)
    check_columns(columns, required, folder)
    return columns


def dataset_fingerprint(index: dict[str, Any]) -> str:
    """Hash of a dataset's content: of its shards' sizes and their own hashes, in order."""
    shards = [(shard['samples'], shard['raw_data']) for shard in index['shards']]
    return xxhash.xxh64(json.dumps(shards, sort_keys=True)).hexdigest()


def read_samples(folder: Union[str, Path]) -> list[dict[str, Any]]:
    """All samples of a local dataset, in order, without Streaming's shared memory."""
    return [sample for shard in read_index(folder)['shards'] for sample in reader_from_json(str(folder), '', shard)]
