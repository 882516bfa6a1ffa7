# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Source of webdataset tars from img2dataset (CC3M, Recap-DataComp-1B), with captions also from tables.

The join with tables uses one DuckDB file.  It has the rows in the order of the tables, and a table of keys,
sorted by hash, so DuckDB reads only the blocks that may hold a requested key.  Both are written out of core.
"""

import functools
import glob
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import pyarrow

from llm2clip.config.ranges import CaptionColumns, FolderName, HoldoutShare, SampleShare, Seed, Text
from llm2clip.data.caption_files import field, normal_path, optional_text
from llm2clip.data.convert.samples import (
    Dropped,
    Filters,
    Part,
    Sample,
    Selection,
    holdout_splits,
    is_in_holdout,
    matching_files,
    sample_name,
)
from llm2clip.data.convert.table import check_column, read_schema
from llm2clip.data.tars import IMAGES, tar_samples
from llm2clip.errors import ConfigError
from llm2clip.io.files import parse_json, read_json, reading, write_json
from llm2clip.io.folders import atomic_folder, clear_work, locked

# Images per lookup in the tables.
_BATCH = 256
_META, _DATABASE = 'index.json', 'captions.duckdb'
# Types of keys and captions.
_TEXTS = re.compile('(large_)?string|dictionary|u?int|null')
_OPTIONS = {'autoinstall_known_extensions': False, 'autoload_known_extensions': False}


def webdataset(
    files: Union[str, Sequence[str]], captions: CaptionColumns, id_field: Text = '__key__',
    split: FolderName = 'train', tables: Union[None, Text, Sequence[Text]] = None,
    table_key: Optional[Text] = None, image_key: Optional[Text] = None, index: Optional[Text] = None,
    filters: Optional[Filters] = None, sample: SampleShare = 1.0, sample_seed: Seed = 0,
    holdout: HoldoutShare = 0.0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Images with captions from webdataset tars: one split or two, one part per tar file.

    Captions come from the tars or from separate tables.  Each image is joined to the table row with its key,
    and the columns of the row replace JSON fields of the same name.  Without a row, these columns are empty.

    Args:
        files: Paths or patterns of tars (``cc3m/*.tar``).
        captions: Caption key -> field of the sample's JSON (``shortSV_captions``), ``txt`` for its text file,
            or column of the tables.
        id_field: JSON field with the sample's id; by default the sample's name in the tar.
        split: Name of the split.
        tables: Paths or patterns of ``.csv`` or ``.tsv`` files with a header, or of Parquet files, with
            captions.  If several rows have the same key, the first one in the order of the tables is used.
        table_key: Column of the tables with the key, such as the image's URL; keys are compared as they are.
        image_key: JSON field with the same key (``url``), or ``__key__`` for the sample's name in the tar.
        index: Folder for the DuckDB file of the tables, written once and about as large as their captions.
            Machines may share it.
        filters: JSON field or column -> ``min``, ``max`` or both of a number, or the ``values`` to keep.
        sample, sample_seed: Share of the samples to keep, chosen by the hash of their id, and its seed.
        holdout, seed: Share of the samples in ``val``, by the hash of their id.  Both splits read all tars.
    """
    splits = holdout_splits(split, holdout)
    paths = matching_files(files)
    selection = Selection(filters, sample, sample_seed)
    join: Optional[CaptionTables] = None
    shared_files: list[str] = []
    required: dict[str, Any] = {
        'tables': tables, 'table_key': table_key, 'image_key': image_key, 'index': index}
    missing = [name for name, value in required.items() if value is None]
    if not missing:
        join = open_tables(required['index'], required['tables'], required['table_key'],
                           list(captions.values()), selection.columns)
        shared_files = [join.description]
    elif len(missing) < len(required):
        raise ConfigError(f'required for captions in tables, as {", ".join(required)} are',
                          f'source.{missing[0]}')
    reader = _TarReader(captions, id_field, join, required['image_key'], selection, holdout, seed)
    parts: dict[str, list[Part]] = {}
    for name, is_holdout in splits.items():
        parts[name] = [Part(Path(path).stem, partial(reader.read, path, is_holdout), [path, *shared_files])
                       for path in paths]
    return parts, Dropped()


class _TarSample(NamedTuple):
    sample_id: str
    fields: dict[str, Any]  # of its JSON, with its name as ``__key__`` and its text file as ``txt``
    image: bytes
    key: str  # of the row in the tables; empty if there is none
    where: str


@dataclass(frozen=True)
class _TarReader:
    """Reader of the samples of tars; the arguments are those of `webdataset`, with opened tables."""

    captions: Mapping[str, str]
    id_field: str
    tables: Optional['CaptionTables']
    image_key: str
    selection: Selection
    holdout: float
    seed: int

    def read(self, path: str, is_holdout: bool, dropped: Dropped) -> Iterator[Sample]:
        """Yield the samples of a tar: the held-out ones or the others."""
        records = tar_samples(path, wanted={*IMAGES, 'json', 'txt'})
        for batch in iter(lambda: list(islice(records, _BATCH)), []):
            samples: list[_TarSample] = []
            for record in batch:
                where = f'{path}: sample {record["__key__"]!r}'
                with reading(f'{where}: txt', 'a text in UTF-8'):
                    text = record.get('txt', b'').decode()
                fields: dict[str, Any] = {'__key__': normal_path(record['__key__']), 'txt': text}
                fields.update(parse_json(record.get('json', '{}'), where, dict))
                sample_id = sample_name(field(fields, self.id_field, where), f'{where}: {self.id_field!r}')
                if is_in_holdout(sample_id, self.holdout, self.seed) is not is_holdout:
                    continue
                if self.selection.samples_out(sample_id, dropped):
                    continue
                image = next((record[suffix] for suffix in IMAGES if suffix in record), None)
                if image is None:
                    dropped.add('no image', sample_id)
                    continue
                key = ''
                if self.tables is not None:
                    value = field(fields, self.image_key, where)
                    if value is not None:
                        key = sample_name(value, f'{where}: {self.image_key!r}')
                samples.append(_TarSample(sample_id, fields, image, key, where))
            yield from self._with_captions(samples, dropped)

    def _with_captions(self, samples: Sequence[_TarSample], dropped: Dropped) -> Iterator[Sample]:
        """Yield the samples to keep, with the captions of the tables; one lookup for all."""
        rows: dict[str, dict[str, Any]] = {}
        without_row: dict[str, Any] = {}
        if self.tables is not None:
            rows = self.tables.find([sample.key for sample in samples])
            without_row = dict.fromkeys(self.tables.columns)
        for sample_id, fields, image, key, where in samples:
            fields.update(rows.get(key, without_row))
            captions: dict[str, str] = {}
            for name, source in self.captions.items():
                captions[name] = optional_text(field(fields, source, where), f'{where}: {source!r}')
            if without_row and key not in rows and not any(captions.values()):
                dropped.add('no row in the tables', sample_id)
            elif not self.selection.filters_out(fields, where, dropped):
                yield Sample(sample_id, captions, image)


class CaptionTables(NamedTuple):
    """Rows of tables by key, which any number of processes may read at once."""

    database: str
    description: str  # file with the names, sizes and times of the tables
    columns: list[str]

    def find(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return key -> column -> value of the first row with that key, for the keys that have a row."""
        with reading(self.database, 'an index of captions; remove its folder to build it again'):
            rows = _connected(self.database, os.getpid()).execute(
                'SELECT k.key, row FROM (SELECT unnest($keys) AS key) AS k JOIN keys ON keys.hash = '
                'md5_number(k.key) JOIN rows ON rows.rowid = number', {'keys': list(keys)}).fetchall()
        return {key: dict(zip(self.columns, parse_json(row, self.database, list))) for key, row in rows}


@functools.cache
def _connected(path: str, process: int) -> Any:
    """DuckDB connection of a process, since connections do not survive a fork."""
    import duckdb
    # Up to `dynamic_or_filter_threshold` keys, a lookup skips the blocks that cannot hold them.
    options = _OPTIONS | {'memory_limit': '1GB', 'threads': 1, 'dynamic_or_filter_threshold': 1024}
    return duckdb.connect(path, read_only=True, config=options)


def open_tables(
    folder: str, tables: Union[str, Sequence[str]], key: str, captions: Sequence[str],
    others: Sequence[str] = (),
) -> CaptionTables:
    """Open the rows of tables by their `key`, from a DuckDB file in `folder` that the first process writes.

    `captions` are text columns and `others` columns of any type; columns that the first table lacks are
    ignored.
    """
    paths = matching_files(tables, 'source.tables')
    schemas = {path: read_schema(path) for path in paths}
    first = schemas[paths[0]].names
    columns = list(dict.fromkeys(name for name in (*captions, *others) if name in first))
    if not set(captions).intersection(first):
        raise ConfigError(f'{paths[0]} has none of the columns {", ".join(captions)}; it has '
                          f'{", ".join(first)}', 'source.captions')
    identity: dict[str, Any] = {'tables': [], 'key': key, 'columns': columns}
    for path, schema in schemas.items():
        for name in (key, *columns):
            check_column(schema, name, path)
            kind = str(schema.field(name).type)
            if name in (key, *captions) and not _TEXTS.match(kind):
                raise ConfigError(f'{path}: column {name!r} holds {kind}, expected texts')
        stat = os.stat(path)
        identity['tables'].append([Path(path).name, stat.st_size, stat.st_mtime_ns])
    index = Path(os.path.abspath(folder))
    with locked(index.with_name(f'.{index.name}.lock'), index, timeout=-1):
        clear_work(index)
        if not (index / _META).is_file():
            with atomic_folder(index, 'an index of captions') as new:
                _write_tables(new, schemas, key, columns)
                write_json(new / _META, identity)
    if read_json(index / _META) != identity:
        raise ConfigError(f'{folder} was built from other tables or columns ({index / _META} has them); '
                          'remove it or choose another folder', 'source.index')
    return CaptionTables(str(index / _DATABASE), f'{folder}/{_META}', columns)


def _write_tables(
    folder: Path, tables: Mapping[str, pyarrow.Schema], key: str, columns: Sequence[str]
) -> None:
    """Write the DuckDB file of `tables` (path -> all columns) and print its number of rows."""
    import duckdb
    options = _OPTIONS | {'memory_limit': '2GB', 'threads': min(8, len(os.sched_getaffinity(0))),
                          'temp_directory': str(folder / 'scratch')}
    with duckdb.connect(str(folder / _DATABASE), config=options) as database:
        database.execute('CREATE TABLE rows (hash UHUGEINT, row VARCHAR)')
        for path, schema in tables.items():
            # DuckDB ignores case in names, so columns are named by position.
            places = {name: f'c{i}' for i, name in enumerate(schema.names)}
            parameters: dict[str, Any] = {'files': [glob.escape(path)]}
            if path.endswith(('.csv', '.tsv')):
                expected = 'a CSV file in UTF-8, in which a text with commas or quotes has quotes'
                table = ('read_csv($files, columns = $columns, auto_detect = false, header = true, '
                         "delim = $delimiter, quote = '\"', escape = '\"', strict_mode = true, "
                         'hive_partitioning = false)')
                parameters['delimiter'] = '\t' if path.endswith('.tsv') else ','
                parameters['columns'] = dict.fromkeys(places.values(), 'VARCHAR')
            else:
                expected = 'a Parquet file'
                table = 'read_parquet($files, hive_partitioning = false)'
            with reading(path, expected):
                database.execute(
                    f"INSERT INTO rows SELECT md5_number(nullif(CAST({places[key]} AS VARCHAR), '')), "
                    f'json_array({", ".join(places[name] for name in columns)}) '
                    f'FROM {table} AS rows({", ".join(places.values())})', parameters)
        database.execute('CREATE TABLE keys AS SELECT hash, min(rowid) AS number FROM rows '
                         'WHERE hash IS NOT NULL GROUP BY hash ORDER BY hash')
        (rows, with_key, different), = database.sql(
            'SELECT count(*), count(hash), (SELECT count(*) FROM keys) FROM rows').fetchall()
        database.execute('CHECKPOINT')  # closing would hide an error
    if not with_key:
        raise ConfigError(f'no row of {", ".join(tables)} has a {key!r}', 'source.tables')
    print(f'source.tables: {rows:,} rows, of which {rows - with_key:,} have no {key!r} and '
          f'{with_key - different:,} that of an earlier row', flush=True)
    shutil.rmtree(folder / 'scratch', ignore_errors=True)
