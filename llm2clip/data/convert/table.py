# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables with one row per sample: Parquet, CSV or TSV files, or datasets of Hugging Face's `datasets`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from llm2clip.config.ranges import CaptionColumns, FolderName, HoldoutShare, SampleShare, Seed, Text
from llm2clip.data.caption_files import UTF8, optional_text, read_csv
from llm2clip.data.convert.samples import (
    Dropped,
    Filters,
    Part,
    Sample,
    Selection,
    check_folder,
    holdout_splits,
    is_in_holdout,
    matching_files,
    read_image,
    sample_name,
)
from llm2clip.errors import ConfigError, FileError, missing_extra
from llm2clip.io.files import reading

# Rows per part of a Hugging Face dataset.
_ROWS = 10_000
_DATASET = 'a dataset that the package datasets reads'

Captions = Union[Text, CaptionColumns]


def read_schema(path: str) -> pyarrow.Schema:
    """Return the columns of a table and their types, which are texts for CSV and TSV files."""
    if path.endswith(('.csv', '.tsv')):
        return pyarrow.schema([(name, pyarrow.string()) for name in read_csv(path)[0]])
    with reading(path, f'a Parquet file, or .csv, {UTF8}'), pyarrow.parquet.ParquetFile(path) as file:
        return file.schema_arrow


def check_column(schema: pyarrow.Schema, column: str, path: str) -> bool:
    """Return whether a column holds lists; raise a ConfigError unless the table has it exactly once."""
    if schema.names.count(column) != 1:
        raise ConfigError(f'{path}: expected one column {column!r}, found {", ".join(schema.names)}')
    return re.match(r'(large_|fixed_size_)?list<', str(schema.field(column).type)) is not None


@dataclass(frozen=True)
class _RowReader:
    """Reader of samples from the rows of tables."""

    caption_keys: Mapping[str, Sequence[str]]
    """Column of captions -> caption keys, one per text of its longest list."""
    image_column: Optional[str]
    id_column: Optional[str]
    folders: Sequence[str]
    """Folders that image files may be in, the first of them that to which paths are relative."""
    holdout: float
    seed: int
    selection: Selection

    @property
    def columns(self) -> list[str]:
        """Names of the columns to read."""
        names = [*self.caption_keys, *self.selection.columns, self.image_column, self.id_column]
        return list(dict.fromkeys(filter(None, names)))

    def samples(
        self, rows: Iterable[Mapping[str, Any]], name: str, dropped: Dropped, is_holdout: bool, first: int = 1
    ) -> Iterator[Sample]:
        """Yield the samples of `rows`, numbered from `first`: the held-out ones or the others."""
        for number, row in enumerate(rows, first):
            where = f'{name}, row {number}'
            sample_id = f'{name}:{number}'
            if self.id_column:
                sample_id = sample_name(row[self.id_column], f'{where}: {self.id_column!r}')

            image = self._image(row, where)
            if is_in_holdout(image or sample_id, self.holdout, self.seed) is not is_holdout:
                continue
            if self.selection.samples_out(sample_id, dropped):
                continue
            if self.selection.filters_out(row, where, dropped):
                continue
            if self.image_column and not image:
                dropped.add('no image', sample_id)
                continue
            if isinstance(image, str):
                image = read_image(self.folders, image, where, dropped)
                if image is None:
                    continue
            yield Sample(sample_id, self._captions(row, where), image)

    def _image(self, row: Mapping[str, Any], where: str) -> Union[None, bytes, str]:
        """Encoded image or path of a row; None if it has none."""
        if self.image_column is None:
            return None
        image = row[self.image_column]
        if isinstance(image, dict):
            image = image.get('bytes') or image.get('path')
        if not isinstance(image, (bytes, str, type(None))):
            raise FileError(f'{self.image_column!r} is {image!r}, expected an encoded image or a path', where)
        return image

    def _captions(self, row: Mapping[str, Any], where: str) -> dict[str, str]:
        """Captions of a row; lists that are shorter than the longest one are filled up with empty texts."""
        captions = dict.fromkeys(chain.from_iterable(self.caption_keys.values()), '')
        for column, keys in self.caption_keys.items():
            texts = row[column]
            if not isinstance(texts, list):
                texts = [texts]
            for key, text in zip(keys, texts):
                captions[key] = optional_text(text, f'{where}: {column!r}')
        return captions


def _caption_keys(
    captions: Captions, tables: Mapping[str, pyarrow.Schema],
    batches: Callable[[str], Iterable[pyarrow.RecordBatch]],
) -> dict[str, list[str]]:
    """Column -> caption keys, one per text of its longest list; `batches` returns the batches of a column."""
    caption_columns: Mapping[str, str] = {'': captions} if isinstance(captions, str) else captions
    keys: dict[str, list[str]] = {}
    for key, column in caption_columns.items():
        has_lists = [check_column(schema, column, path) for path, schema in tables.items()]
        if not any(has_lists):
            keys[column] = [key or '0']
            continue
        longest = 0
        for batch in batches(column):
            lengths = pyarrow.compute.call_function('list_value_length', [batch.column(0)])
            # The maximum is None if all lists are null.
            longest = max(longest, pyarrow.compute.call_function('max', [lengths]).as_py() or 0)
        prefix = f'{key}_' if key else ''
        keys[column] = [f'{prefix}{i}' for i in range(longest)]
    all_keys = list(chain.from_iterable(keys.values()))
    if len(set(all_keys)) < len(all_keys) or len(keys) < len(caption_columns):
        raise ConfigError(f'{captions} gives two captions one key, or one column twice', 'source.captions')
    return keys


def table(
    files: Union[str, Sequence[str]], captions: Captions, image_column: Optional[str] = None,
    images: Optional[str] = None, id_column: Optional[str] = None, split: FolderName = 'train',
    holdout: HoldoutShare = 0.0, seed: Seed = 0, filters: Optional[Filters] = None, sample: SampleShare = 1.0,
    sample_seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Parquet, CSV or TSV tables: one split or two, one part per table.

    Args:
        files: Paths or patterns of ``.csv`` or ``.tsv`` files with a header, or of Parquet files.
        captions: Caption key -> column of texts or lists of texts, or a single column.  A column of lists
            becomes ``<key>_0``, ``<key>_1``, …, one per text of its longest list; a single column becomes
            ``0``, ``1``, ….
        image_column: Column of encoded images, ``{bytes, path}`` structs or paths; unset, captions alone.
        images: Folder that paths are relative to; others are refused.  Unset, every path is allowed.
        id_column: Column of sample ids, texts or whole numbers; by default an id is ``<file>:<row>``.
        split: Name of the split.
        holdout, seed: Share of the images in the split ``val``, chosen by the hash of their path or bytes, so
            that all rows of an image are in one split.  Without images, the hash of the id decides.
        filters: Column -> ``min``, ``max`` or both of a number, or the ``values`` to keep.
        sample, sample_seed: Share of the samples to keep, chosen by the hash of their id, and its seed.
    """
    splits = holdout_splits(split, holdout)
    selection = Selection(filters, sample, sample_seed)
    paths = matching_files(files)
    folders = [] if images is None else [check_folder(images)]
    schemas = {path: read_schema(path) for path in paths}

    caption_keys = _caption_keys(
        captions, schemas, lambda column: chain.from_iterable(_batches(path, [column]) for path in paths))
    reader = _RowReader(caption_keys, image_column, id_column, folders, holdout, seed, selection)
    for path, schema in schemas.items():
        for name in reader.columns:
            check_column(schema, name, path)

    def read(path: str, is_holdout: bool, dropped: Dropped) -> Iterator[Sample]:
        return reader.samples(_rows(path, reader.columns), Path(path).name, dropped, is_holdout)

    parts: dict[str, list[Part]] = {}
    for name, is_holdout in splits.items():
        parts[name] = [Part(Path(path).stem, partial(read, path, is_holdout), [path]) for path in paths]
    return parts, Dropped()


def _batches(path: str, names: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Columns of a Parquet file, 256 rows at a time."""
    with reading(path, 'a Parquet file'), pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=256, columns=names)


def _rows(path: str, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Rows of a table, with at least the columns `names`."""
    if path.endswith(('.csv', '.tsv')):
        yield from (row for _, row in read_csv(path)[1])
        return
    for batch in _batches(path, names):
        with reading(path, 'a Parquet file with texts in UTF-8'):
            values = batch.to_pylist()
        yield from values


def huggingface(
    path: str, captions: Captions, image_column: Optional[str] = None, config: Optional[str] = None,
    split: FolderName = 'train', id_column: Optional[str] = None, images: Optional[str] = None,
    holdout: HoldoutShare = 0.0, seed: Seed = 0, filters: Optional[Filters] = None, sample: SampleShare = 1.0,
    sample_seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """One split of a Hugging Face dataset: saved to disk, in a local folder of files, or on the hub.

    It is read in parts of 10,000 rows.  Code that comes with a dataset is not executed.

    Args:
        path: Folder written by `save_to_disk`; folder of images with a ``metadata.csv``, of Parquet files or
            of other files that the library reads; or ``owner/dataset`` on the hub.
        captions, image_column, holdout, seed, filters, sample, sample_seed: As for `table`.
        images: Folder that paths are relative to; paths outside of it are refused.  Default: `path` if it is
            a folder of files, and the library's caches.  A saved dataset may have any paths.
        config: Configuration of the dataset, if it has several.
        split: Split of the dataset; it keeps its name, and other splits are not read.
        id_column: Column of sample ids; by default an id is ``<split>:<row>``.
    """
    splits = holdout_splits(split, holdout)
    selection = Selection(filters, sample, sample_seed)
    dataset = _load_dataset(path, config, split)
    folders: list[str] = []  # a saved dataset may name any
    if images is not None:
        folders = [check_folder(images)]
    elif not _is_saved(path):
        from datasets import config as cache
        from huggingface_hub.constants import HF_HUB_CACHE
        folders = [path, *map(str, (cache.HF_CACHE_HOME, cache.DOWNLOADED_DATASETS_PATH,
                                    cache.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE))]

    schemas = {path: dataset.features.arrow_schema}
    caption_keys = _caption_keys(
        captions, schemas, lambda column: dataset.select_columns([column]).with_format('arrow').iter(_ROWS))
    reader = _RowReader(caption_keys, image_column, id_column, folders, holdout, seed, selection)
    rows = dataset.select_columns(reader.columns)

    def read(start: int, is_holdout: bool, dropped: Dropped) -> Iterator[Sample]:
        part = rows.select(range(start, min(start + _ROWS, len(rows))))
        with reading(f'source.path: {path}', _DATASET):
            yield from reader.samples(part, split, dropped, is_holdout, first=start + 1)

    parts: dict[str, list[Part]] = {}
    for name, is_holdout in splits.items():
        starts = range(0, len(rows), _ROWS)
        parts[name] = [Part(f'{start:08}', partial(read, start, is_holdout)) for start in starts]
    return parts, Dropped()


def _is_saved(path: str) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return Path(path, 'dataset_dict.json').is_file() or Path(path, 'state.json').is_file()


def _load_dataset(path: str, config: Optional[str], split: str) -> Any:
    """One split of a dataset of the library, with images as they are encoded."""
    try:
        import datasets
    except ImportError as error:
        raise missing_extra('source.name: huggingface', 'datasets', error) from None
    # A name without owner is a reader of the library: `csv` would read files of the working directory.
    if not Path(path).is_dir() and path.count('/') != 1:
        raise ConfigError(f'there is no folder {Path(path).absolute()}, and a dataset of the hub is called '
                          'owner/dataset', 'source.path')
    with reading(f'source.path: {path}', _DATASET):
        if _is_saved(path):
            dataset: Any = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path, config, split=split)
    if isinstance(dataset, datasets.DatasetDict):
        names = ', '.join(map(str, dataset))
        if split not in dataset:
            raise ConfigError(f'there is no {split!r} in {path}; it has {names}', 'source.split')
        print(f'source.split: of {names}, only {split!r} is read', flush=True)
        dataset = dataset[split]
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset
