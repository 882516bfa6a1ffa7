# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets of the Hugging Face `datasets` library: saved ones, local folders of files, or those of the hub."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.data.convert.samples import HELDOUT, Dropped, Part, Sample, Splits, check_heldout_share
from llm2clip.data.convert.table import Captions, Columns, longest_list

__all__ = ['huggingface']

_ROWS = 10_000


def huggingface(
    path: str,
    captions: Captions,
    image_column: Optional[str] = None,
    config: Optional[str] = None,
    split: str = 'train',
    id_column: Optional[str] = None,
    images: Optional[str] = None,
    heldout: float = 0.0,
    seed: int = 0,
) -> tuple[Splits, Dropped]:
    """One split of a dataset, in parts of 10,000 rows.  No code that comes with a dataset is run.

    Args:
        path: Folder that `save_to_disk` wrote; folder of images with a ``metadata.csv``, of Parquet files or of
            others that the library reads; or the name of a dataset on the hub, ``owner/dataset``.
        captions: Caption key -> column of texts or of lists of texts, or one column; `Columns.choose` says which keys
            a column of lists becomes.
        image_column: Column of images, encoded ones or paths; without one, a dataset of captions.
        config: Which of the dataset's configurations, where it has several.
        split: Which of its splits; it keeps its name.
        id_column: Column of the samples' ids; by default ``<split>:<row>``.
        images: Folder that paths are relative to.
        heldout: Share of the images that go into the split ``heldout``, chosen by the hash of their path or bytes, so
            that all rows of an image are on one side; without images, by that of the id.
        seed: Which ones.

    Raises:
        ConfigError: The library is not installed, or there is no such dataset, split or column.
    """
    check_heldout_share(heldout, split)
    rows = _load(path, config, split)
    columns = Columns.choose(
        captions, {path: rows.features.arrow_schema},
        lambda column: max(longest_list(batch.column(0)) for batch in
                           rows.select_columns([column]).with_format('arrow').iter(_ROWS)),
        image_column, images, id_column)
    rows = rows.select_columns(columns.names())

    def read(start: int, held_out: bool, dropped: Dropped) -> Iterator[Sample]:
        part = rows.select(range(start, min(start + _ROWS, len(rows))))
        return columns.samples(part, split, dropped, heldout, seed, held_out, first=start + 1)

    return {name: [Part(f'{start:08}', partial(read, start, name == HELDOUT)) for start in range(0, len(rows), _ROWS)]
            for name in ((split, HELDOUT) if heldout else (split,))}, Dropped()


def _load(path: str, config: Optional[str], split: str) -> Any:
    """The rows of a split, images as they are stored."""
    try:
        import datasets
    except ImportError:
        raise ConfigError('the huggingface source needs the package datasets: pip install "llm2clip[datasets]"') \
            from None
    # Other names are those of the library's readers, which would take any files of the working directory.
    if not Path(path).is_dir() and path.count('/') != 1:
        raise ConfigError(f'source.path: there is no folder {Path(path).absolute()}, and a dataset of the hub is '
                          'called owner/dataset')
    saved = any(Path(path, name).is_file() for name in ('dataset_dict.json', 'state.json'))
    try:
        rows: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config, split=split)
    except (ValueError, OSError, RuntimeError) as error:
        there = 'a' if Path(path).is_dir() else 'no'
        raise ConfigError(f'source.path: {path} cannot be read (there is {there} folder {Path(path).absolute()}): '
                          f'{error}') from None
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ConfigError(f'source.split: there is no {split!r} in {path}; it has {", ".join(map(str, rows))}')
        rows = rows[split]
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows
