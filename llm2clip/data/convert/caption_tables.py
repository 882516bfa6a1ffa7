# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions in tables, by a key such as the image's URL, for images that lie elsewhere: one DuckDB file per join.

It has the rows in the order of the tables, and a table of keys that is sorted by their hashes, of which DuckDB reads
only the blocks that may hold what is looked up.  Both are written out of core.
"""

import functools
import glob
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from llm2clip.config import ConfigError
from llm2clip.data.convert.samples import matching_files
from llm2clip.data.convert.table import check_column, check_key, is_csv, is_list, read_schema
from llm2clip.files import parse_json, read_json, reading, write_json
from llm2clip.folders import complete_folder, locked

__all__ = ['CaptionTables', 'open_tables']

_META, _DATABASE = 'index.json', 'captions.duckdb'
_OPTIONS = {'autoinstall_known_extensions': False, 'autoload_known_extensions': False}
# What DuckDB adds to what is wrong with a CSV file.
_ADVICE = re.compile(r'\s*(Possible (fixes|solution)|  file = ).*', re.DOTALL | re.IGNORECASE)


class CaptionTables(NamedTuple):
    """The rows of tables by their keys, which any number of processes may read at once."""

    database: str
    files: list[str]
    columns: list[str]
    counts: dict[str, int]
    """How many ``rows`` there are, and how many of them are ``without_key`` or ``repeated``: with an earlier row's."""

    def find(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Key, exactly as it stands in the tables -> the first row that has it, column -> value."""
        with reading(self.database, 'an index of captions; remove its folder to build it again'):
            found = _connected(self.database, os.getpid()).execute(
                'SELECT k.key, row FROM (SELECT unnest($keys) AS key) AS k JOIN keys ON keys.hash = '
                'md5_number(k.key) JOIN rows ON rows.rowid = number', {'keys': list(keys)}).fetchall()
        return {key: dict(zip(self.columns, parse_json(row, self.database, list))) for key, row in found}


@functools.cache
def _connected(path: str, process: int) -> Any:
    """The connection of a process, since none survives a fork."""
    import duckdb
    # Up to so many values that are looked up at once say which blocks are read.
    options = {**_OPTIONS, 'memory_limit': '1GB', 'threads': 1, 'dynamic_or_filter_threshold': 1024}
    return duckdb.connect(path, read_only=True, config=options)


def open_tables(
    folder: str, tables: Union[str, Sequence[str]], key: str, captions: Sequence[str], others: Sequence[str] = ()
) -> CaptionTables:
    """The rows of some tables by their keys, from a DuckDB file that one of the processes that ask for it writes.

    Args:
        folder: Where the file is or will be; it needs as much space as the tables' captions.
        tables: Paths or patterns of ``.csv`` or ``.tsv`` files with a header, or of Parquet files.
        key: Column of the keys, texts or whole numbers.
        captions: Columns of texts or of lists of texts, as far as the tables have them.
        others: Other columns, likewise.

    Raises:
        ConfigError: No table matches, one lacks the key or a column that another one has, none has captions, no row has
            a key, or the folder has a file of other tables.
        FileError: A table cannot be read; the message names it and, in a CSV file, the line.
    """
    paths = matching_files(tables, 'source.tables')
    schemas = {path: read_schema(path) for path in paths}
    first = schemas[paths[0]].names
    texts = [name for name in captions if name in first]
    if not texts:
        raise ConfigError(f'source.captions: {paths[0]} has none of the columns {", ".join(captions)}; it has '
                          f'{", ".join(first)}')
    columns = list(dict.fromkeys([*texts, *(name for name in others if name in first)]))
    for path, schema in schemas.items():
        for name in (key, *columns):
            check_column(schema, name, path)
        check_key(schema, key, path)
        for name in texts:
            is_list(schema, name, path)
    stats = {path: os.stat(path) for path in paths}
    identity = {'tables': [[Path(path).name, stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()],
                'key': key, 'columns': columns}
    place = Path(os.path.abspath(folder))
    with locked(place.with_name(f'.{place.name}.lock'), place, wait=True):
        if not (place / _META).is_file():
            with complete_folder(place, 'an index of captions') as new:
                counts = _write(new, {path: schema.names for path, schema in schemas.items()}, key, columns)
                write_json(new / _META, {**identity, 'counts': counts})
    found = read_json(place / _META, dict)
    for name, value in identity.items():
        if found.get(name) != value:
            raise ConfigError(f'source.index: {folder} was built from other {name} ({place / _META} has them); remove '
                              'it or choose another folder')
    return CaptionTables(str(place / _DATABASE), paths, columns, found['counts'])


def _write(folder: Path, tables: Mapping[str, Sequence[str]], key: str, columns: Sequence[str]) -> dict[str, int]:
    """Write the DuckDB file of tables, path -> names of all columns; returns the counts of rows."""
    import duckdb
    options = {**_OPTIONS, 'memory_limit': '2GB', 'threads': min(8, len(os.sched_getaffinity(0))),
               'temp_directory': str(folder / 'scratch')}
    with duckdb.connect(str(folder / _DATABASE), config=options) as database:
        database.execute('CREATE TABLE rows (hash UHUGEINT, row VARCHAR)')
        for path, names in tables.items():
            # DuckDB ignores case in names, so the columns are called by their places.
            places = {name: f'c{i}' for i, name in enumerate(names)}
            table, parameters = 'read_parquet($files, hive_partitioning = false)', {'files': [glob.escape(path)]}
            if is_csv(path):
                table = ('read_csv($files, columns = $columns, auto_detect = false, header = true, delim = $delimiter, '
                         "quote = '\"', escape = '\"', strict_mode = true, hive_partitioning = false)")
                parameters |= {'delimiter': '\t' if path.endswith('.tsv') else ',',
                               'columns': dict.fromkeys(places.values(), 'VARCHAR')}
            with reading(path, 'a CSV file in UTF-8, in which a text with commas or quotes has quotes' if is_csv(path)
                         else 'a Parquet file'):
                try:
                    database.execute(
                        f"INSERT INTO rows SELECT md5_number(nullif(CAST({places[key]} AS VARCHAR), '')), "
                        f'json_array({", ".join(places[name] for name in columns)}) '
                        f'FROM {table} AS rows({", ".join(places.values())})', parameters)
                except duckdb.Error as error:
                    text = ' '.join(_ADVICE.sub('', str(error)).split())
                    raise ValueError(text if len(text) < 300 else f'{text[:150]} … {text[-150:]}') from error
        database.execute('CREATE TABLE keys AS SELECT hash, min(rowid) AS number FROM rows WHERE hash IS NOT NULL '
                         'GROUP BY hash ORDER BY hash')
        (rows, with_key, different), = database.sql(
            'SELECT count(*), count(hash), (SELECT count(*) FROM keys) FROM rows').fetchall()
    if not with_key:
        raise ConfigError(f'source.tables: no row of {", ".join(tables)} has a {key!r}')
    shutil.rmtree(folder / 'scratch', ignore_errors=True)
    return {'rows': rows, 'without_key': rows - with_key, 'repeated': with_key - different}
