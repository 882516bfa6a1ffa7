# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Column names and types of every dataset: the single source of truth.

An image dataset has `sample_id`, `image` and one ``caption.<key>`` per caption; a caption dataset has no
`image`.  An embeddings dataset has `sample_id` and one ``text_embedding.<key>`` per caption, and for int8
vectors also one ``text_embedding_scale.<key>``.

Every sample has every column.  A missing caption is an empty text, and its vector is zero.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import xxhash
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash

from llm2clip.errors import FileError
from llm2clip.io.files import parse_json, read_text, reading

SAMPLE_ID = 'sample_id'
IMAGE = 'image'
CAPTION = 'caption.'
EMBEDDING = 'text_embedding.'
EMBEDDING_SCALE = 'text_embedding_scale.'
INDEX = 'index.json'
TEACHER_FILE = 'teacher.json'
"""File of an embeddings dataset that records its teacher and the dataset that it belongs to."""

_COLUMNS = ('column_names', 'column_encodings', 'column_sizes')
_TYPES = {SAMPLE_ID: ('str',), IMAGE: ('bytes',), CAPTION: ('str',), EMBEDDING_SCALE: ('float32',),
          EMBEDDING: ('ndarray:float16:', 'ndarray:float32:', 'ndarray:int8:')}


def columns_of(
    reader: Any, required: Sequence[str] = (), where: Union[str, Path] = ''
) -> dict[str, str]:
    """Return column name -> MDS type of a shard; errors for `required` columns as for `read_columns`."""
    columns = dict(zip(reader.column_names, reader.column_encodings))
    for name in required:
        if name not in columns:
            existing = ', '.join(sorted(columns))
            raise FileError(f'column {name!r} is missing; the dataset has {existing}', where)
        family = next(prefix for prefix in _TYPES if name.startswith(prefix))
        if not columns[name].startswith(_TYPES[family]):
            expected = ' or '.join(map(repr, _TYPES[family]))
            raise FileError(f'column {name!r} has type {columns[name]!r}, expected {expected}', where)
    return columns


def embedding_dim(reader: Any) -> int:
    """Return the dimension of the vectors of an embeddings dataset, from one of its shards."""
    types = [kind for name, kind in columns_of(reader).items() if name.startswith(EMBEDDING)]
    return int(types[0].rsplit(':', 1)[1])


def caption_keys(columns: Iterable[str], prefix: str = CAPTION) -> list[str]:
    """Return the caption keys among the column names of a dataset; with the prefix `EMBEDDING`, those of the
    vectors of an embeddings dataset."""
    return [name.removeprefix(prefix) for name in columns if name.startswith(prefix)]


def read_index(folder: Union[str, Path]) -> dict[str, Any]:
    """Read the index of the MDS dataset in `folder`, and check that its shards have the same columns.

    Raises:
        FileError: The index is missing or damaged, has another format, no shards, or files elsewhere.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileError(f'there is no MDS dataset in {folder}')
    index = parse_json(read_text(path, 'the index of an MDS dataset'), path, dict)
    shards = index.get('shards')
    if not shards:
        raise FileError('the MDS dataset is empty, expected a list of shards', path)
    for i, shard in enumerate(shards):
        check_shard(shard, f'{path}: shard {i}')
        if any(shard[name] != shards[0][name] for name in _COLUMNS):
            raise FileError(
                f'shard {i} has columns {shard["column_names"]}, expected those of the first shard', path)
    return index


def check_shard(shard: Any, where: str) -> None:
    """Raise a FileError that names `where`, unless `shard` is a valid entry of an index, and safe to read."""
    with reading(where, 'an entry of an MDS index'):
        # Fails if a key is missing or unknown, or the format or its version is another one.
        reader = MDSReader.from_json('', '', shard)
        reader.validate(allow_unsafe_types=False)
        name = reader.raw_data.basename
        if name.startswith('/') or '..' in name.split('/'):
            raise FileError(f'the file {name!r} is outside the folder', where)
        if reader.compression is not None:
            raise FileError('is compressed, expected shards that are not', where)


def file_damage(path: Path, expected: FileInfo) -> Optional[str]:
    """Return how a file differs from its size and hash in the index, or None; FileError if unreadable."""
    with reading(path, 'a file of a dataset'):
        data = path.read_bytes()
    if len(data) != expected.bytes:
        return f'{len(data)} bytes, expected {expected.bytes}'
    for algorithm, digest in expected.hashes.items():
        actual = get_hash(algorithm, data)
        if actual != digest:
            return f'{algorithm} {actual}, expected {digest}'
    return None


def whole_shard(folder: Union[str, Path], shard: dict[str, Any]) -> Any:
    """Verify a shard of the local dataset in `folder` by its entry in the index, and return a reader.

    Raises:
        FileError: The shard's file is missing or differs from the entry.
    """
    path = Path(folder, shard['raw_data']['basename'])
    damage = file_damage(path, FileInfo(**shard['raw_data']))
    if damage is not None:
        raise FileError(f'the shard {path} is damaged: {damage}')
    return MDSReader.from_json(str(folder), '', shard)


def read_columns(folder: Union[str, Path], required: Sequence[str] = ()) -> dict[str, str]:
    """Return column name -> MDS type of the dataset in `folder`; errors also as for `read_index`.

    Raises:
        FileError: One of the `required` columns is missing, or its type does not fit its name.
    """
    shard = read_index(folder)['shards'][0]
    return columns_of(MDSReader.from_json(str(folder), '', shard), required, folder)


def dataset_fingerprint(index: dict[str, Any]) -> str:
    """Return a hash of a dataset's content: the sizes and hashes of its shards, in order."""
    content = [(shard['samples'], shard['raw_data']) for shard in index['shards']]
    return xxhash.xxh64_hexdigest(json.dumps(content, sort_keys=True))


def read_samples(folder: Union[str, Path]) -> list[dict[str, Any]]:
    """Return all samples of a local dataset in order; errors as for `read_index` and `whole_shard`."""
    samples: list[dict[str, Any]] = []
    for shard in read_index(folder)['shards']:
        samples.extend(whole_shard(folder, shard))
    return samples


def vector_columns(keys: Sequence[str], dim: int, storage: str) -> dict[str, str]:
    """Return the column names and MDS types of an embeddings dataset.  A vector takes ``2 * dim`` bytes in
    float16, ``4 * dim`` in float32, and ``dim + 4`` in int8."""
    columns = {SAMPLE_ID: 'str'}
    columns.update({EMBEDDING + key: f'ndarray:{storage}:{dim}' for key in keys})
    if storage == 'int8':
        columns.update({EMBEDDING_SCALE + key: 'float32' for key in keys})
    return columns


def vector_rows(
    ids: Sequence[str], keys: Sequence[str], vectors: np.ndarray, storage: str
) -> list[dict[str, Any]]:
    """Return the samples of an embeddings dataset.

    Args:
        ids: N sample ids.
        keys: K caption keys.
        vectors: ``(N, K, D)`` in float32; zero for a missing caption.
        storage: ``float16``, ``float32``, or ``int8`` with a scale per vector, its largest magnitude / 127.

    Raises:
        ValueError: A value is not finite, or too large for float16; the message names the sample and key.
    """
    with np.errstate(over='ignore'):
        values = vectors.astype(np.float16) if storage == 'float16' else vectors
    bad = ~np.isfinite(values).all(-1)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise ValueError(f'the vector {keys[j]!r} of sample {ids[i]!r} is not finite in {storage}')
    scales: dict[str, np.ndarray] = {}
    if storage == 'int8':
        scale = (np.abs(vectors).max(-1) / 127).astype(np.float32)
        safe = np.where(scale > 0, scale, 1)[..., None]
        values = np.clip(np.rint(vectors / safe), -127, 127).astype(np.int8)
        scales = {EMBEDDING_SCALE + key: scale[:, j] for j, key in enumerate(keys)}
    embeddings = {EMBEDDING + key: values[:, j] for j, key in enumerate(keys)}
    columns = {SAMPLE_ID: ids} | embeddings | scales
    return [{name: column[i] for name, column in columns.items()} for i in range(len(ids))]
