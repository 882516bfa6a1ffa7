# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of captions by a key, such as the image's URL, for images that lie elsewhere.

An index is a folder: the rows in the order of the tables, one JSON list a line, and a sorted array of the keys' hashes
with where each row begins.  DuckDB reads the tables and sorts the hashes out of core.  Tars that were downloaded in the
order of the tables read their rows one after the other; others read one row at a time from anywhere in the file.
"""

import glob
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import pyarrow
from tqdm import tqdm

from llm2clip.config import ConfigError
from llm2clip.data.convert.samples import matching_files
from llm2clip.data.convert.table import is_csv, is_key, is_list, read_schema
from llm2clip.files import FileError, parse_json, read_json, reading, write_json
from llm2clip.folders import complete_folder, locked

__all__ = ['CaptionIndex', 'build_index']

_KIND = 'an index of captions'
_META, _ROWS = 'index.json', 'rows.jsonl'
# The two halves of the keys' hashes and where their rows begin, sorted in this order.
_ARRAYS = ('hash', 'hash_rest', 'start')
_MEMORY, _THREADS, _BATCH = '2GB', 8, 1 << 15
# Bytes that most rows have at most.
_ROW = 4096
_COUNTS = ('rows', 'without_key', 'repeated')
# What DuckDB adds to what is wrong with a CSV file.
_ADVICE = re.compile(r'\s*(Possible (fixes|solution)|  file = ).*', re.DOTALL | re.IGNORECASE)


class CaptionIndex:
    """The rows of tables by their keys, which any number of processes may read at once, also through one object.

    Args:
        folder: What `build_index` wrote.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self._folder = Path(folder)
        meta = read_json(self._folder / _META, dict)
        self.columns: list[str] = meta['columns']
        """Those that its rows have."""
        self.counts: dict[str, int] = {name: meta[name] for name in _COUNTS}
        """How many rows the tables have, and how many of them have no key, or one that an earlier row has."""
        self.rows_file = str(self._folder / _ROWS)
        """Its content depends on that of the tables alone."""

    def find(self, key: str) -> Optional[int]:
        """The number of the first row with a key, exactly as it stands in the table; None if there is none."""
        digest = _hash(key)
        hashes, rest, _ = self._arrays
        i = int(np.searchsorted(hashes, np.uint64(digest[0])))
        while i < len(hashes) and hashes[i] == digest[0]:
            if rest[i] == digest[1]:
                return i
            i += 1
        return None

    def row(self, number: int) -> dict[str, Any]:
        """Column -> value of the row that `find` numbers.

        Raises:
            FileError: The index is damaged.
        """
        start, size, text = int(self._arrays[2][number]), _ROW, b''
        while b'\n' not in text and (more := os.pread(self._file.fileno(), size, start + len(text))):
            text, size = text + more, 2 * size
        where = f'{self._folder / _ROWS}: byte {start:,}'
        values = parse_json(text.partition(b'\n')[0], where, list)
        if len(values) != len(self.columns):
            raise FileError(f'{where}: holds {len(values)} values, expected {len(self.columns)}')
        return dict(zip(self.columns, values))

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        size = self.counts['rows'] - self.counts['without_key']
        arrays = []
        for name in _ARRAYS:
            path = self._folder / f'{name}.npy'
            expected = f'{size} whole numbers; remove {self._folder} to build the index again'
            with reading(path, expected):
                arrays.append(np.asarray(np.load(path, mmap_mode='r', allow_pickle=False)))
            if arrays[-1].shape != (size,) or arrays[-1].dtype != np.uint64:
                raise FileError(f'{path}: holds {arrays[-1].dtype} values of shape {arrays[-1].shape}, expected '
                                f'{expected}')
        return arrays

    @cached_property
    def _file(self) -> BinaryIO:
        return (self._folder / _ROWS).open('rb', buffering=0)


def build_index(
    folder: str, tables: Union[str, Sequence[str]], key: str, captions: Sequence[str], others: Sequence[str] = ()
) -> CaptionIndex:
    """The index of some tables, which is built unless it is there.

    Where several rows have one key, the first one counts, in the order of the tables.  Several processes may ask for it
    at once: one builds it, the others wait.  Its bytes depend on the tables alone.

    Args:
        folder: Where it is or will be; it needs as much space as the tables' captions.
        tables: Paths or patterns of ``.csv`` or ``.tsv`` files with a header, or of Parquet files.
        key: Column of the keys, texts or whole numbers.
        captions: Columns of texts or of lists of texts, as far as the tables have them.
        others: Other columns, likewise.

    Raises:
        ConfigError: No table matches, one lacks the key or a column that another one has, none has captions, no row has
            a key, or there is another index in the folder.
        FileError: A table cannot be read; the message names it and, in a CSV file, the line.
    """
    paths = matching_files(tables, 'source.tables')
    columns = _columns(paths, key, captions, others)
    identity = {'tables': [_identity(path) for path in paths], 'key': key, 'columns': columns}
    place = Path(os.path.abspath(folder))
    with locked(place.with_name(f'.{place.name}.lock'), place, wait=True):
        if not (place / _META).is_file():
            with complete_folder(place, _KIND) as new:
                write_json(new / _META, {**identity, **_build(new, paths, key, columns)})
    found = read_json(place / _META, dict)
    for name, value in identity.items():
        if found.get(name) != value:
            raise ConfigError(f'source.index: {folder} was built from other {name} ({place / _META} has them); remove '
                              'it or choose another folder')
    return CaptionIndex(place)


def _columns(paths: Sequence[str], key: str, captions: Sequence[str], others: Sequence[str]) -> list[str]:
    """The columns that the rows will have, checked."""
    schemas = {path: read_schema(path) for path in paths}
    first = schemas[paths[0]].names
    found = [name for name in dict.fromkeys(captions) if name in first]
    if not found:
        raise ConfigError(f'source.captions: {paths[0]} has none of the columns {", ".join(captions)}; it has '
                          f'{", ".join(first)}')
    columns = list(dict.fromkeys([*found, *(name for name in others if name in first)]))
    for path, schema in schemas.items():
        for name in (key, *columns):
            if name not in schema.names:
                raise ConfigError(f'{path} has no column {name!r}; it has {", ".join(schema.names)}')
            if schema.names.count(name) > 1:
                raise ConfigError(f'{path} has two columns {name!r}, expected different names')
        if not is_key(schema.field(key).type):
            raise ConfigError(f'{path}: column {key!r} holds {schema.field(key).type}, expected texts or whole numbers')
        for name in found:
            is_list(schema, name, path)  # or an error
    return columns


def _identity(path: str) -> list[Any]:
    """What changes with the content of a file: name, size and time."""
    stat = os.stat(path)
    return [Path(path).name, stat.st_size, stat.st_mtime_ns]


def _hash(key: str) -> tuple[int, int]:
    """128 bits, as DuckDB's ``md5_number_upper`` and ``md5_number_lower``."""
    digest = hashlib.md5(key.encode('utf-8', 'replace'), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], 'little'), int.from_bytes(digest[8:], 'little')


def _build(folder: Path, paths: Sequence[str], key: str, columns: Sequence[str]) -> dict[str, int]:
    """Write all files of an index but its facts; returns the counts of rows."""
    import duckdb
    scratch = folder / 'scratch'
    scratch.mkdir()
    options = {'memory_limit': _MEMORY, 'threads': min(_THREADS, len(os.sched_getaffinity(0))),
               'temp_directory': str(scratch), 'autoinstall_known_extensions': False,
               'autoload_known_extensions': False}
    rows = 0
    with duckdb.connect(str(scratch / 'hashes.duckdb'), config=options) as database:
        database.execute('CREATE TABLE hashes (hash UBIGINT, hash_rest UBIGINT, start UBIGINT)')
        with (folder / _ROWS).open('wb') as file, tqdm(desc='index captions', unit=' rows') as progress:
            for batch in itertools.chain.from_iterable(_read(database, path, key, columns) for path in paths):
                progress.update(batch.num_rows)
                rows += batch.num_rows
                _append(database, file, batch)
        kept = database.sql('SELECT count(*) FROM hashes').fetchall()[0][0]
        if not kept:
            raise ConfigError(f'source.tables: no row of {", ".join(paths)} has a {key!r}')
        repeated = _write_arrays(database, folder, kept)
    shutil.rmtree(scratch)
    return {'rows': rows, 'without_key': rows - kept, 'repeated': repeated}


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """What DuckDB says of a table, less its advice, as an error that names the table."""
    expected = 'a CSV file in UTF-8, in which a text with commas or quotes has quotes' if is_csv(path) \
        else 'a Parquet file'
    import duckdb
    with reading(path, expected):
        try:
            yield
        except duckdb.Error as error:
            text = ' '.join(_ADVICE.sub('', str(error)).split())
            raise ValueError(text if len(text) < 300 else f'{text[:150]} … {text[-150:]}') from error


def _read(database: Any, path: str, key: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a table, in their order, with the halves of their keys' hashes, null without key."""
    # DuckDB ignores case in names, so the columns are called by their places.
    names = read_schema(path).names
    places = [f'c{i}' for i in range(len(names))]
    name = f'CAST({places[names.index(key)]} AS VARCHAR)'
    values = ', '.join(places[names.index(column)] for column in columns)
    table = 'read_parquet($files, hive_partitioning = false)'
    parameters: dict[str, Any] = {'files': [glob.escape(path)]}
    if is_csv(path):
        table = ('read_csv($files, columns = $columns, auto_detect = false, header = true, delim = $delimiter, '
                 "quote = '\"', escape = '\"', strict_mode = true, hive_partitioning = false)")
        parameters |= {'delimiter': '\t' if path.endswith('.tsv') else ',',
                       'columns': dict.fromkeys(places, 'VARCHAR')}
    with _readable(path):
        reader = database.sql(
            f'SELECT json_array({values}) || chr(10) AS row, '
            f"md5_number_upper(nullif({name}, '')) AS hash, md5_number_lower(nullif({name}, '')) AS hash_rest "
            f'FROM {table} AS rows({", ".join(places)})', params=parameters).to_arrow_reader(_BATCH)
        yield from reader


def _append(database: Any, file: BinaryIO, batch: pyarrow.RecordBatch) -> None:
    """Write the rows that have a key, and keep where each begins."""
    batch = batch.filter(batch['hash'].is_valid())
    if not batch.num_rows:
        return
    rows = batch['row']
    _, offsets, text = rows.buffers()
    ends = np.frombuffer(offsets, np.int32)[rows.offset:rows.offset + len(rows) + 1].astype(np.uint64)
    starts = pyarrow.array(ends[:-1] - ends[0] + np.uint64(file.tell()))
    file.write(memoryview(text)[int(ends[0]):int(ends[-1])])
    found = pyarrow.table([batch['hash'], batch['hash_rest'], starts], names=list(_ARRAYS))
    with database.cursor() as cursor:
        cursor.register('found', found)
        cursor.execute('INSERT INTO hashes SELECT * FROM found')
        cursor.unregister('found')


def _write_arrays(database: Any, folder: Path, size: int) -> int:
    """The hashes in order, of equal ones the first row first; returns how many rows have the key of an earlier one."""
    arrays = [np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.uint64, (size,)) for name in _ARRAYS]
    done = repeated = 0
    for batch in database.sql('SELECT * FROM hashes ORDER BY hash, hash_rest, start').to_arrow_reader(_BATCH):
        end = done + batch.num_rows
        for name, array in zip(_ARRAYS, arrays):
            array[done:end] = batch[name].to_numpy()
        # With the last one before them.
        hashes, rest = (array[max(done - 1, 0):end] for array in arrays[:2])
        repeated += int(((hashes[1:] == hashes[:-1]) & (rest[1:] == rest[:-1])).sum())
        done = end
    for array in arrays:
        array.flush()
    return repeated
