# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables (Parquet or CSV) with one row per sample: captions in columns, images as bytes or as paths."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Optional, Union

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from llm2clip.data.convert.columns import Captions, Columns, longest_list
from llm2clip.data.convert.samples import (
    HELDOUT,
    Dropped,
    Part,
    Sample,
    Splits,
    check_heldout_share,
    matching_files,
)

__all__ = ['table']


def table(
    files: Union[str, Sequence[str]],
    captions: Captions,
    image_column: Optional[str] = None,
    images: Optional[str] = None,
    id_column: Optional[str] = None,
    split: str = 'train',
    heldout: float = 0.0,
    seed: int = 0,
) -> tuple[Splits, Dropped]:
    """One split or two, one part per table.

    Args:
        files: Paths or patterns of ``.parquet`` or ``.csv`` files.
        captions: Caption key -> column of texts or of lists of texts, or one column; `Columns.choose` says which keys
            a column of lists becomes.
        image_column: Column of encoded images, of Hugging Face's ``{bytes, path}`` structs, or of paths; without one,
            a dataset of captions.
        images: Folder that paths are relative to.
        id_column: Column of the samples' ids; by default ``<file>:<row>``.
        split: Name of the split.
        heldout: Share of the images that go into the split ``heldout``, chosen by the hash of their path or bytes, so
            that all rows of an image are on one side; without images, by that of the id.
        seed: Which ones.

    Raises:
        ConfigError: No table matches, or one lacks a column.
    """
    check_heldout_share(heldout, split)
    paths = matching_files(files)

    def longest(column: str) -> int:
        return max((longest_list(batch.column(0)) for path in paths for batch in _open(path, [column])[1]), default=0)

    columns = Columns.choose(captions, {path: _open(path, None)[0] for path in paths}, longest,
                             image_column, images, id_column)

    def read(path: str, held_out: bool, dropped: Dropped) -> Iterator[Sample]:
        rows = (row for batch in _open(path, columns.names())[1] for row in batch.to_pylist())
        return columns.samples(rows, Path(path).name, dropped, heldout, seed, held_out)

    return {name: [Part(Path(path).stem, partial(read, path, name == HELDOUT)) for path in paths]
            for name in ((split, HELDOUT) if heldout else (split,))}, Dropped()


def _open(path: str, columns: Optional[list[str]]) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """The table's columns, and the rows of some of them."""
    if path.endswith('.csv'):
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        names = pyarrow.csv.open_csv(path, parse_options=parse).schema.names
        options = pyarrow.csv.ConvertOptions(include_columns=columns or [], strings_can_be_null=False)
        if columns is not None:
            options.column_types = {name: pyarrow.string() for name in columns}
        return pyarrow.schema([(name, pyarrow.string()) for name in names]), iter(
            pyarrow.csv.open_csv(path, convert_options=options, parse_options=parse))
    file = pyarrow.parquet.ParquetFile(path)
    return file.schema_arrow, file.iter_batches(batch_size=256, columns=columns)
