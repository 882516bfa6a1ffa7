# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables (Parquet or CSV) with one row a sample: captions in columns, images as bytes or as paths."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from llm2clip.config import ConfigError
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits

__all__ = ['table']


def table(
    files: Union[str, Sequence[str]],
    captions: Mapping[str, str],
    image_column: Optional[str] = None,
    images: Optional[str] = None,
    id_column: Optional[str] = None,
    split: str = 'train',
) -> tuple[Splits, Dropped]:
    """One split, a part a table.

    Args:
        files: Paths or patterns of ``.parquet`` or ``.csv`` files.
        captions: Caption key -> column.
        image_column: Column of encoded images, of Hugging Face's ``{bytes, path}`` structs, or of paths; without one,
            a dataset of captions.
        images: Folder that paths are relative to.
        id_column: Column of the samples' ids; by default ``<file>:<row>``.
        split: Name of the split.

    Raises:
        ConfigError: No table matches, or one lacks a column.
    """
    paths = [path for pattern in ([files] if isinstance(files, str) else files) for path in sorted(glob.glob(pattern))]
    if not paths:
        raise ConfigError(f'source.files: no file matches {files}')
    columns = [*captions.values(), *(name for name in (image_column, id_column) if name)]
    for path in paths:
        there = _open(path, None)[0]
        for name in columns:
            if name not in there:
                raise ConfigError(f'{path} has no column {name!r}; it has {", ".join(there)}')
    read = partial(_samples, dict(captions), image_column, images, id_column)
    return {split: [Part(Path(path).stem, partial(read, path)) for path in paths]}, Dropped()


def _open(path: str, columns: Optional[list[str]]) -> tuple[list[str], Iterator[pyarrow.RecordBatch]]:
    """Column names, and the rows of some columns."""
    if path.endswith('.csv'):
        options = pyarrow.csv.ConvertOptions(include_columns=columns or [], strings_can_be_null=False)
        names = pyarrow.csv.open_csv(path).schema.names
        if columns is not None:
            options.column_types = {name: pyarrow.string() for name in columns}
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return names, iter(pyarrow.csv.open_csv(path, convert_options=options, parse_options=parse))
    file = pyarrow.parquet.ParquetFile(path)
    return file.schema_arrow.names, file.iter_batches(batch_size=256, columns=columns)


def _samples(
    captions: dict[str, str], image_column: Optional[str], images: Optional[str], id_column: Optional[str], path: str,
    dropped: Dropped
) -> Iterator[Sample]:
    columns = list(dict.fromkeys([*captions.values(), *(name for name in (image_column, id_column) if name)]))
    number = 0
    for batch in _open(path, columns)[1]:
        for row in batch.to_pylist():
            number += 1
            sample_id = str(row[id_column]) if id_column else f'{Path(path).name}:{number}'
            texts = {key: str(row[column] or '') for key, column in captions.items()}
            if image_column is None:
                yield Sample(sample_id, texts)
                continue
            image = _image(row[image_column], images)
            if image is None:
                dropped.add('no image', sample_id)
            else:
                yield Sample(sample_id, texts, image)


def _image(value: Any, images: Optional[str]) -> Optional[bytes]:
    if isinstance(value, dict):
        value = value.get('bytes') or value.get('path')
    if not value or isinstance(value, bytes):
        return value or None
    path = Path(images or '', value)
    return path.read_bytes() if path.is_file() else None
