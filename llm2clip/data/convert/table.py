# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables with one row per sample: captions in columns of texts or of lists of texts, images as bytes or as paths.

They are Parquet, CSV or TSV files, or datasets of the Hugging Face `datasets` library.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from llm2clip.config import ConfigError
from llm2clip.config.ranges import FolderName, HeldOutShare, Seed, Text
from llm2clip.data.caption_files import normal_path, read_csv, read_header
from llm2clip.data.convert.samples import (
    HELDOUT,
    IMAGE_FIELDS,
    Dropped,
    Filters,
    Part,
    Sample,
    SampleShare,
    Selection,
    Splits,
    check_folder,
    check_split,
    is_held_out,
    listed_captions,
    matching_files,
    read_image,
    sample_name,
)
from llm2clip.files import reading

__all__ = ['Captions', 'Columns', 'check_column', 'check_key', 'huggingface', 'is_csv', 'is_list', 'read_schema',
           'table']

# Of a Hugging Face dataset, in one part.
_ROWS = 10_000
_DATASET = 'a dataset that the package datasets reads'

Captions = Union[Text, dict[Text, Text]]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table make a sample."""

    captions: dict[str, list[str]]
    """Column -> the caption keys that it becomes; several for a column of lists."""
    image: Optional[str] = None
    """Column of encoded images, of Hugging Face's ``{bytes, path}`` structs, or of paths; None for captions alone."""
    images: Optional[str] = None
    """Folder that paths are relative to and cannot leave; without one, they may lead anywhere."""
    sample_id: Optional[str] = None
    """Column of the samples' ids."""
    also: tuple[str, ...] = ()
    """Other folders in which images may be."""
    selection: Selection = Selection()
    """Which of the samples are wanted."""

    @classmethod
    def choose(
        cls, captions: Captions, tables: Mapping[str, pyarrow.Schema], longest: Callable[[str], int],
        image: Optional[str] = None, images: Optional[str] = None, sample_id: Optional[str] = None,
        also: tuple[str, ...] = (), selection: Optional[Selection] = None,
    ) -> 'Columns':
        """The columns that the configuration names, checked.

        A column of texts becomes the caption key that the configuration gives it, and a column of lists the keys
        ``<key>_0``, ``<key>_1``, …, as many as its longest list has texts.  A column that is named without a key
        becomes ``0``, ``1``, ….

        Args:
            captions: Caption key -> column, or one column.
            tables: Name of each table, for messages -> its columns and their types.
            longest: Column of lists -> the number of texts in its longest list, over all tables.
            image, images, sample_id, also, selection: As the fields.

        Raises:
            ConfigError: A table lacks a column, a column has another type than expected, or there is no such folder.
        """
        if not captions:
            raise ConfigError('source.captions: expected a column, or caption keys with their columns')
        if images is not None:
            check_folder(images)
        selection = selection or Selection()
        if selection.by_image and image is None:
            raise ConfigError(f'source.filters: {", ".join(IMAGE_FIELDS)} need images, expected an image_column')
        named = [('', captions)] if isinstance(captions, str) else list(captions.items())
        for path, schema in tables.items():
            for name in (*(column for _, column in named), *selection.columns,
                         *(name for name in (image, sample_id) if name)):
                check_column(schema, name, path)
            if image is not None:
                kind = schema.field(image).type
                is_struct = pyarrow.types.is_struct(kind) and any(field.name in ('bytes', 'path') for field in kind)
                if not _is_text(kind) and not is_struct and not re.match('(large_|fixed_size_)?binary', str(kind)):
                    raise ConfigError(f'{path}: column {image!r} holds {kind}, expected encoded images or paths')
        keys: dict[str, list[str]] = {}
        for key, column in named:
            kinds = {is_list(schema, column, path) for path, schema in tables.items()}
            if len(kinds) > 1:
                raise ConfigError(f'column {column!r} holds texts in some tables and lists of texts in others')
            if kinds == {True}:
                names = [f'{key}_{i}' if key else str(i) for i in range(longest(column))]
            else:
                names = [key or '0']
            keys.setdefault(column, []).extend(names)
        every = [name for names in keys.values() for name in names]
        if len(set(every)) < len(every) or len(keys) < len(named):
            raise ConfigError(f'source.captions: {captions} gives two captions one key, or one column twice')
        return cls(keys, image, images, sample_id, also, selection)

    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.captions, *self.selection.columns,
                                   *(name for name in (self.image, self.sample_id) if name)]))

    def samples(
        self, rows: Iterable[Mapping[str, Any]], name: str, dropped: Dropped, heldout: float = 0.0, seed: int = 0,
        held_out: bool = False, first: int = 1,
    ) -> Iterator[Sample]:
        """The samples of some rows.

        Args:
            rows: Column -> value.
            name: Of the table; without a column of ids, a sample's is ``<name>:<row>``.
            dropped: Receives the rows without image, and how many are not wanted.
            heldout: Share of the images that are held out: by their path, their bytes or, without images, the id.
            seed: Which ones.
            held_out: Yield those that are held out; otherwise the others.
            first: Number of the first row.
        """
        for number, row in enumerate(rows, first):
            where = f'{name}:{number}'
            sample_id = sample_name(row[self.sample_id], f'{where}: {self.sample_id!r}') if self.sample_id else where
            image = row[self.image] if self.image else None
            if isinstance(image, dict):
                image = image.get('bytes') or image.get('path')
            elif self.sample_id == self.image:
                sample_id = normal_path(sample_id)
            if heldout and is_held_out(image or sample_id, heldout, seed) is not held_out:
                continue
            if self.selection.samples_out(sample_id, dropped) or self.selection.filters_out(row, where, dropped):
                continue
            if self.image and not image:
                dropped.add('no image', sample_id)
                continue
            if isinstance(image, str):
                image = read_image(self.images, image, where, dropped, self.also)
                if image is None:
                    continue
            if image is not None and self.selection.filters_image_out(image, sample_id, dropped):
                continue
            texts: dict[str, str] = {}
            for column, keys in self.captions.items():
                texts |= listed_captions(row[column], keys, f'{where}: {column!r}')
            yield Sample(sample_id, texts, image)


def _longest_list(lists: Any) -> int:
    """The number of values in the longest list of an Arrow array, which may hold nulls."""
    lengths = pyarrow.compute.call_function('list_value_length', [lists])
    return pyarrow.compute.call_function('max', [lengths]).as_py() or 0


def is_list(schema: pyarrow.Schema, column: str, path: str) -> bool:
    """Whether a column of captions holds lists; a ConfigError if it holds neither texts nor lists of texts."""
    kind = schema.field(column).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or \
        pyarrow.types.is_fixed_size_list(kind)
    if not _is_text(kind.value_type if is_list else kind):
        raise ConfigError(f'{path}: column {column!r} holds {kind}, expected texts or lists of texts')
    return is_list


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether values of a type are texts, or all null."""
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(kind) in ('string', 'large_string', 'string_view', 'null')


def check_column(schema: pyarrow.Schema, column: str, path: str) -> None:
    """Raise a ConfigError unless a table has a column, once."""
    if column not in schema.names:
        raise ConfigError(f'{path} has no column {column!r}; it has {", ".join(schema.names)}')
    if schema.names.count(column) > 1:
        raise ConfigError(f'{path} has two columns {column!r}, expected different names')


def check_key(schema: pyarrow.Schema, column: str, path: str) -> None:
    """Raise a ConfigError unless a column's values can be keys: texts, or whole numbers."""
    kind = schema.field(column).type
    if not _is_text(kind) and not pyarrow.types.is_integer(kind):
        raise ConfigError(f'{path}: column {column!r} holds {kind}, expected texts or whole numbers')


def table(
    files: Union[str, Sequence[str]],
    captions: Captions,
    image_column: Optional[str] = None,
    images: Optional[str] = None,
    id_column: Optional[str] = None,
    split: FolderName = 'train',
    heldout: HeldOutShare = 0.0,
    seed: Seed = 0,
    filters: Optional[Filters] = None,
    sample: SampleShare = 1.0,
    sample_seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """Tables, Parquet or CSV: one split or two, one part per table.

    Args:
        files: Paths or patterns of ``.csv`` or ``.tsv`` files with a header, or of Parquet files.
        captions: Caption key -> column of texts or of lists of texts, or one column; `Columns.choose` says which keys
            a column of lists becomes.
        image_column: Column of encoded images, of Hugging Face's ``{bytes, path}`` structs, or of paths; without one,
            a dataset of captions.
        images: Folder that paths are relative to, and that they cannot leave.  Without one, a path is absolute or
            relative to the current folder, and may lead anywhere.
        id_column: Column of the samples' ids, texts or whole numbers; by default ``<file>:<row>``.
        split: Name of the split.
        heldout: Share of the images that go into the split ``heldout``, chosen by the hash of their path or bytes, so
            that all rows of an image are on one side; without images, by that of the id.
        seed: Which ones.

    Raises:
        ConfigError: No table matches, or one lacks a column.
        FileError: A table cannot be read, or a value is not what it should be.
    """
    check_split(split, heldout)
    paths, selection = matching_files(files), Selection(filters, sample, sample_seed)

    def longest(column: str) -> int:
        return max((_longest_list(batch.column(0)) for path in paths for batch in _batches(path, [column])), default=0)

    columns = Columns.choose(captions, {path: read_schema(path) for path in paths}, longest,
                             image_column, images, id_column, selection=selection)

    def read(path: str, held_out: bool, dropped: Dropped) -> Iterator[Sample]:
        return columns.samples(_rows(path, columns.names()), Path(path).name, dropped, heldout, seed, held_out)

    return {name: [Part(Path(path).stem, partial(read, path, name == HELDOUT), [path]) for path in paths]
            for name in ((split, HELDOUT) if heldout else (split,))}, Dropped()


def is_csv(path: str) -> bool:
    """Whether a table is a CSV file or one whose name ends with ``.tsv``; others are Parquet files."""
    return path.endswith(('.csv', '.tsv'))


def read_schema(path: str) -> pyarrow.Schema:
    """The table's columns and their types; those of a CSV file are texts."""
    if is_csv(path):
        return pyarrow.schema([(name, pyarrow.string()) for name in read_header(path)])
    with reading(path, 'a Parquet file'), pyarrow.parquet.ParquetFile(path) as file:
        return file.schema_arrow


def _batches(path: str, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    """Columns of a Parquet file."""
    with reading(path, 'a Parquet file'), pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=256, columns=columns)


def _rows(path: str, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of a table; of a Parquet file, with these columns alone."""
    if is_csv(path):
        yield from (row for _, row in read_csv(path))
        return
    for batch in _batches(path, columns):
        with reading(path, 'a Parquet file with texts in UTF-8'):
            rows = batch.to_pylist()
        yield from rows


def huggingface(
    path: str,
    captions: Captions,
    image_column: Optional[str] = None,
    config: Optional[str] = None,
    split: FolderName = 'train',
    id_column: Optional[str] = None,
    images: Optional[str] = None,
    heldout: HeldOutShare = 0.0,
    seed: Seed = 0,
    filters: Optional[Filters] = None,
    sample: SampleShare = 1.0,
    sample_seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """One split of a dataset: a saved one, a local folder of files, or one of the hub.  It is read in parts of 10,000
    rows.  No code that comes with a dataset is run.

    Args:
        path: Folder that `save_to_disk` wrote; folder of images with a ``metadata.csv``, of Parquet files or of
            others that the library reads; or the name of a dataset on the hub, ``owner/dataset``.
        captions, image_column, heldout, seed, filters, sample, sample_seed: As for `table`.
        images: Folder that paths are relative to, and that they cannot leave.  Without one, `path` for a folder of
            files and the library's cache for a dataset of the hub; the paths of a saved dataset may lead anywhere.
        config: Which of the dataset's configurations, where it has several.
        split: Which of its splits; it keeps its name.
        id_column: Column of the samples' ids; by default ``<split>:<row>``.

    Raises:
        ConfigError: The library is not installed, or there is no such split or column.
        FileError: There is no such dataset, or it cannot be read.
    """
    check_split(split, heldout)
    selection = Selection(filters, sample, sample_seed)
    try:
        import datasets
    except ImportError:
        raise ConfigError('the huggingface source needs the package datasets: pip install "llm2clip[datasets]"') \
            from None
    is_folder, is_saved = Path(path).is_dir(), any(Path(path, name).is_file()
                                                   for name in ('dataset_dict.json', 'state.json'))
    # Other names are those of the library's readers, which would take any files of the working directory.
    if not is_folder and path.count('/') != 1:
        raise ConfigError(f'source.path: there is no folder {Path(path).absolute()}, and a dataset of the hub is '
                          'called owner/dataset')
    there = 'a' if is_folder else 'no'
    with reading(f'source.path: {path}', f'{_DATASET} (there is {there} folder {Path(path).absolute()})'):
        rows: Any = datasets.load_from_disk(path) if is_saved else datasets.load_dataset(path, config, split=split)
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ConfigError(f'source.split: there is no {split!r} in {path}; it has {", ".join(map(str, rows))}')
        rows = rows[split]
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    also: tuple[str, ...] = ()
    if images is None and not is_saved:
        # Where the library puts images that a dataset names.
        from datasets import config as cache
        from huggingface_hub.constants import HF_HUB_CACHE
        images = path if is_folder else str(cache.HF_CACHE_HOME)
        also = (*map(str, (cache.HF_CACHE_HOME, cache.DOWNLOADED_DATASETS_PATH, cache.EXTRACTED_DATASETS_PATH)),
                HF_HUB_CACHE)
    columns = Columns.choose(
        captions, {path: rows.features.arrow_schema},
        lambda column: max((_longest_list(batch.column(0)) for batch in
                            rows.select_columns([column]).with_format('arrow').iter(_ROWS)), default=0),
        image_column, images, id_column, also, selection)
    rows = rows.select_columns(columns.names())

    def read(start: int, held_out: bool, dropped: Dropped) -> Iterator[Sample]:
        part = rows.select(range(start, min(start + _ROWS, len(rows))))
        with reading(f'source.path: {path}', _DATASET):
            yield from columns.samples(part, split, dropped, heldout, seed, held_out, first=start + 1)

    return {name: [Part(f'{start:08}', partial(read, start, name == HELDOUT)) for start in range(0, len(rows), _ROWS)]
            for name in ((split, HELDOUT) if heldout else (split,))}, Dropped()
