# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Webdataset tars, as img2dataset writes CC3M, CC12M, YFCC15M and Recap-DataComp-1B."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Optional, Union

import xxhash

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Count, FolderName, HeldOutShare, Seed, Text
from llm2clip.data.caption_files import field, normal_path, optional_text
from llm2clip.data.convert.caption_tables import CaptionTables, open_tables
from llm2clip.data.convert.samples import (
    HELDOUT,
    Dropped,
    Filters,
    Part,
    Sample,
    SampleShare,
    Selection,
    Splits,
    check_split,
    is_held_out,
    listed_captions,
    matching_files,
    sample_name,
)
from llm2clip.data.tars import IMAGES, tar_samples
from llm2clip.files import FileError, parse_json, read_json, reading

__all__ = ['webdataset']

# Images that are looked up in tables at once.
_BATCH = 256
_HASHES = {'__sha256__': lambda image: hashlib.sha256(image).hexdigest(), '__xxh64__': xxhash.xxh64_hexdigest}


def webdataset(
    files: Union[str, Sequence[str]], captions: dict[Text, Text], id_field: Text = '__key__',
    split: FolderName = 'train', lists: Optional[dict[Text, Count]] = None,
    tables: Union[None, Text, Sequence[Text]] = None, table_key: Optional[Text] = None,
    image_key: Optional[Text] = None, index: Optional[Text] = None, filters: Optional[Filters] = None,
    sample: SampleShare = 1.0, sample_seed: Seed = 0, heldout: HeldOutShare = 0.0, seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """Images with captions: one split or two, one part per tar file.

    The captions are in the tars, or in tables elsewhere, of which each image gets the row with its key.  A sample then
    has the columns of its row beside the fields of its JSON, and in place of those of the same name.  An image without
    a row has none of those captions.

    Args:
        files: Paths or patterns (``cc3m/*.tar``).
        captions: Caption key -> field of the sample's JSON (``shortSV_captions``), ``txt`` for its text file, or column
            of the tables.
        id_field: Field of the JSON that is the sample's id; the name inside the tar by default.
        split: Name of the split.
        lists: Caption key whose field holds a list of texts -> how many they are at most.  ``{dense: 3}`` makes the
            keys ``dense_0``, ``dense_1`` and ``dense_2``; those that a sample lacks are empty.
        tables: Paths or patterns of ``.csv`` or ``.tsv`` files with a header, or of Parquet files, with captions.
            Where several rows have one key, the first counts, in the order of the tables.
        table_key: Column of the tables with the key, such as the image's URL.  Keys are compared as they are.
        image_key: Field of the JSON with the same key (``url``), ``__key__`` for the sample's name in the tar, or
            ``__sha256__`` or ``__xxh64__`` for a hash, in small hexadecimal digits, of the image's bytes in the tar.
            (The ``sha256`` in the JSON of img2dataset is that of the bytes before it made the image smaller.)
        index: Folder for a DuckDB file of the tables, as large as their captions, which is written once.  Machines may
            share it; nothing needs it when the dataset is complete.
        filters, sample, sample_seed: Which samples are wanted, as `Selection` takes them; a filter names a field of the
            JSON, a column of the tables, or ``__width__``, ``__height__`` or ``__aspect__``.
        heldout: Share of the samples that go into the split ``heldout``, chosen by the hash of their id.  Each split
            reads the tars.
        seed: Which ones.

    Raises:
        ConfigError: No tar or table matches, an argument of the tables is missing, or they lack a column.
        FileError: A tar is damaged or cut off, holds links or paths that lead out of it, or a sample lacks a field; the
            message names tar and sample.  Or a table cannot be read.
    """
    check_split(split, heldout)
    paths = matching_files(files)
    keys = _keys(captions, lists or {})
    selection = Selection(filters, sample, sample_seed)
    dropped, join = Dropped(), None
    given = {'tables': tables, 'table_key': table_key, 'image_key': image_key, 'index': index}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ConfigError(f'source.{missing[0]}: required for captions in tables, as {", ".join(given)} are')
    else:
        assert tables and table_key and image_key and index
        join = open_tables(index, tables, table_key, list(captions.values()), list(selection.columns)), image_key
        dropped.tables = Counter(join[0].counts)
    wanted = {*IMAGES, 'json', *{'txt'}.intersection([*captions.values(), *selection.columns, id_field, image_key])}

    def read(path: str, held_out: bool, dropped: Dropped) -> Iterator[Sample]:
        def is_here(sample_id: str) -> bool:
            return is_held_out(sample_id, heldout, seed) is held_out

        return _samples(path, dict(captions), keys, id_field, wanted, join, is_here, selection, dropped)

    return {name: [Part(Path(path).stem, partial(read, path, name == HELDOUT), [path, *(join[0].files if join else [])])
                   for path in paths]
            for name in ((split, HELDOUT) if heldout else (split,))}, dropped


def _keys(captions: Mapping[str, str], lists: Mapping[str, int]) -> dict[str, list[str]]:
    """Caption key of the configuration -> those that it becomes."""
    if not captions:
        raise ConfigError('source.captions: expected caption keys with the fields that hold them')
    for name in lists:
        if name not in captions:
            raise ConfigError(f'source.lists.{name}: there is no such key in source.captions; it has '
                              f'{", ".join(captions)}')
    keys = {key: [f'{key}_{i}' for i in range(lists[key])] if key in lists else [key] for key in captions}
    every = [name for names in keys.values() for name in names]
    if twice := [name for name in every if every.count(name) > 1]:
        raise ConfigError(f'source.lists: two captions get the key {twice[0]!r}, expected different keys')
    return keys


def _samples(
    path: str, captions: dict[str, str], keys: dict[str, list[str]], id_field: str, wanted: set[str],
    join: Optional[tuple[CaptionTables, str]], is_here: Callable[[str], bool], selection: Selection, dropped: Dropped,
) -> Iterator[Sample]:
    """The samples of a tar for which `is_here`, joined with tables by the field of their key."""
    count, records = 0, tar_samples(path, wanted=wanted)
    while batch := list(islice(records, 1 if join is None else _BATCH)):
        count += len(batch)
        here = [sample for record in batch if is_here((sample := _read(path, record, id_field))[0])]
        table_keys = ['' if join is None or image is None else _key(fields, join[1], image, where)
                      for _, fields, image, where in here]
        rows = {} if join is None else join[0].find(table_keys)
        for (sample_id, fields, image, where), table_key in zip(here, table_keys):
            row = rows.get(table_key)
            if selection.samples_out(sample_id, dropped):
                continue
            if image is None:
                dropped.add('no image', sample_id)
                continue
            if join is not None:
                fields |= row or dict.fromkeys(join[0].columns)
            texts: dict[str, str] = {}
            for key, name in captions.items():
                value, what = field(fields, name, where), f'{where}: {name!r}'
                texts |= listed_captions(value, keys[key], what) if keys[key] != [key] else \
                    {key: optional_text(value, what)}
            if join is not None and row is None and not any(texts.values()):
                dropped.add('no row in the tables', sample_id)
            elif not selection.filters_out(fields, where, dropped) and \
                    not selection.filters_image_out(image, sample_id, dropped):
                yield Sample(sample_id, texts, image)
    stats = Path(path).with_name(f'{Path(path).stem}_stats.json')
    if stats.is_file() and (expected := field(read_json(stats, dict), 'successes', str(stats))) != count:
        raise FileError(f'{path}: has {count} samples, expected {expected!r}, as {stats.name} says')


def _read(path: str, record: Mapping[str, Any], id_field: str) -> tuple[str, dict[str, Any], Optional[bytes], str]:
    """Id, fields and image of a sample in a tar, and where it is."""
    where = f'{path}: sample {record["__key__"]!r}'
    with reading(f'{where}: txt', 'a text in UTF-8'):
        text = (record.get('txt') or b'').decode()
    fields = {'__key__': normal_path(record['__key__']), 'txt': text,
              **parse_json(record.get('json', '{}'), where, dict)}
    sample_id = sample_name(field(fields, id_field, where), f'{where}: {id_field!r}')
    return sample_id, fields, next((record[name] for name in IMAGES if name in record), None), where


def _key(fields: Mapping[str, Any], image_key: str, image: bytes, where: str) -> str:
    """By which an image is found in tables; empty if it has none."""
    hashed = _HASHES.get(image_key)
    key = field(fields, image_key, where) if hashed is None else hashed(image)
    return '' if key is None else sample_name(key, f'{where}: {image_key!r}')
