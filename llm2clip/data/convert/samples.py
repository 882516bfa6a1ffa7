# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Interface of data sources: samples in parts that are converted one by one, and a record of omitted ones."""

import dataclasses
import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional, Union

import xxhash
from pydantic import Field

from llm2clip.config.ranges import Finite, Holdout, Text
from llm2clip.data.caption_files import check_text, field, normal_path
from llm2clip.data.images import read_image_file
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.io.files import reading
from llm2clip.io.folders import inside
from llm2clip.registry import check_arguments

Filters = dict[Text, dict[Text, Any]]
MISSING_FILE = 'missing image file'
_VAL = 'val'
_SAME_NAME = '{!r} is the name of the held-out split; give the other one another name'


@dataclass
class Sample:
    """One sample of a dataset."""

    sample_id: str
    captions: dict[str, str]
    """Caption key -> text; every sample has the same keys.  A missing caption is an empty text."""
    image: Union[bytes, None] = None
    """Encoded image; None in caption datasets."""


@dataclass
class Dropped:
    """Samples left out: reason -> sample ids, or paths of missing files."""

    reasons: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    filtered: Counter[str] = dataclasses.field(default_factory=Counter)
    """Reason -> number of samples that the user's settings leave out; `max_dropped` does not count them."""

    def add(self, reason: str, *sample_ids: str) -> None:
        self.reasons.setdefault(reason, []).extend(sample_ids)

    def update(self, reasons: Mapping[str, Sequence[str]], filtered: Mapping[str, int]) -> None:
        """Add the samples of another record."""
        for reason, ids in reasons.items():
            self.add(reason, *ids)
        self.filtered.update(filtered)

    def counts(self) -> dict[str, int]:
        return {reason: len(ids) for reason, ids in self.reasons.items()}


@dataclass
class Part:
    """Piece of a split, usually one input file, which one process converts, again after a kill."""

    name: str
    """Name that is the same each time the source is read; the part's folder is ``part-<name>``."""
    read: Callable[[Dropped], Iterable[Sample]]
    """Function that yields the samples and adds omitted ones to the `Dropped`."""
    files: Sequence[str] = ()
    """Input files that determine the samples, such as a tar or a caption file, without the image files."""


def one_part(samples: Iterable[Sample]) -> list[Part]:
    """Return a split as a single part, for sources with few samples."""
    return [Part('all', lambda dropped: samples)]


def _hash(image: Union[str, bytes], seed: int) -> float:
    """Hash of an image from 0 to 1, the same for all spellings of a path."""
    if isinstance(image, str):
        image = normal_path(image)
    return xxhash.xxh64_intdigest(image, seed=seed) / 2**64


def is_in_holdout(image: Union[str, bytes], share: float, seed: int = 0) -> bool:
    """Return whether an image, given by id, path or bytes, is in the held-out share, by its hash."""
    return _hash(image, seed) < share


def holdout_splits(split: str, share: float) -> dict[str, bool]:
    """Return split -> whether it has the held-out samples: `split`, and ``val`` unless the share is 0.

    Raises:
        ConfigError: Both splits have the same name.
    """
    if not share:
        return {split: False}
    if split == _VAL:
        raise ConfigError(_SAME_NAME.format(split), 'source.split')
    return {split: False, _VAL: True}


def split_holdout(
    images: Iterable[str], holdout: Holdout, seed: int, split: str = 'train'
) -> dict[str, list[str]]:
    """Return split -> ids of its images in their order; the hash of an id decides whether it is held out.

    If images are added, a share moves none of the others.  A number may move images out of a held-out split,
    but never a training image into one, so that no image is used for evaluation after training on it.

    Args:
        images: All ids, without duplicates.
        holdout, seed: Share between 0 and 1, or number of images with the smallest hashes, for ``val``;
            or split -> number of its images.
        split: Name of the split with the remaining images.

    Raises:
        ConfigError: A split would be empty, or two splits would have the same name.
    """
    images = list(images)
    if not holdout:
        return {split: images}
    if isinstance(holdout, dict):
        counts = holdout
    elif holdout < 1:
        counts = {_VAL: sum(is_in_holdout(image, holdout, seed) for image in images)}
    else:
        counts = {_VAL: holdout}
    if split in counts:
        raise ConfigError(_SAME_NAME.format(split), 'source.split')
    total = sum(counts.values())
    if not isinstance(total, int) or min(counts.values()) < 1 or total >= len(images):
        raise ConfigError(f'got {holdout!r}, expected a share between 0 and 1, or a number of images, by '
                          f'which each split has some of the {len(images)} images', 'source.holdout')
    ranked = iter(sorted(images, key=lambda image: (_hash(image, seed), image)))
    split_of: dict[str, str] = {}
    for name, count in counts.items():
        split_of.update(dict.fromkeys(islice(ranked, int(count)), name))
    splits: dict[str, list[str]] = {name: [] for name in (split, *counts)}
    for image in images:
        splits[split_of.get(image, split)].append(image)
    return splits


def check_folder(images: str) -> str:
    """Return the folder of images; raise a ConfigError if it does not exist."""
    if not Path(images).is_dir():
        raise ConfigError(f'there is no folder {Path(images).absolute()}', 'source.images')
    return images


def read_image(folders: Sequence[str], name: str, where: str, dropped: Dropped) -> Optional[bytes]:
    """Read an image file; if it does not exist, record it in `dropped` and return None.

    The path is relative to the first folder.  A path outside of all folders raises a FileError that names its
    origin `where`.  Without folders, every path is allowed.
    """
    path = inside(folders[0], name, where, folders[1:]) if folders else Path(name)
    if not os.path.isfile(path):
        dropped.add(MISSING_FILE, str(path.absolute()))
        return None
    return read_image_file(path)


def sample_name(value: Any, where: str) -> str:
    """Return a sample id from a text or a whole number; raise a FileError for any other value."""
    if not isinstance(value, (str, int)):
        raise FileError(f'{value!r}, expected a text or a whole number', where)
    return check_text(str(value), where)


def matching_files(files: Union[str, Sequence[str]], key: str = 'source.files') -> list[str]:
    """Return the files that match paths or patterns, sorted by name within each pattern.

    A pattern without a match raises a ConfigError with the `key`.
    """
    patterns = [files] if isinstance(files, str) else files
    matches: list[str] = []
    for pattern in patterns:
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not paths:
            raise ConfigError(f'no file matches {pattern!r} in {Path.cwd()}', key)
        matches += paths
    return matches


@dataclass(frozen=True)
class Filter:
    """Condition on a column: a number in a range, or one of several values."""

    min: Finite = -math.inf
    max: Finite = math.inf
    values: Optional[Annotated[list[Union[Text, int, bool]], Field(min_length=1)]] = None
    """Values to keep, compared as texts: true as ``true``, 1 and 1.0 as ``1``."""

    def __post_init__(self) -> None:
        has_limits = (self.min, self.max) != (-math.inf, math.inf)
        if has_limits is (self.values is not None) or self.min > self.max:
            raise ConfigError('expected min, max or both of a number, the smaller one first, or the values '
                              'that are kept')

    def keeps(self, value: Any, where: str) -> bool:
        """Return whether to keep a value, unless it is blank or NaN; FileError if it should be a number."""
        if value is None or not str(value).strip():
            return False
        if self.values is not None:
            return _as_text(value) in map(_as_text, self.values)
        with reading(where, 'a number'):
            return self.min <= float(value) <= self.max


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # pandas stores integers with gaps as floats
        return str(int(value))
    return str(value)


class Selection:
    """Filters and subsampling of a source.

    Args:
        filters: Column -> the fields of a `Filter`.  A sample without a value is left out.
        share: Share of the samples to keep.  The hash of the id decides, whatever the others,
            so a smaller share is a subset of a larger one with the same seed.

    Raises:
        ConfigError: A filter has wrong arguments or an empty range.
    """

    def __init__(self, filters: Optional[Filters] = None, share: float = 1.0, seed: int = 0) -> None:
        self._share, self._seed = share, seed
        self._filters: dict[str, Filter] = {}
        for name, arguments in (filters or {}).items():
            with under(f'source.filters.{name}'):
                check_arguments(Filter, 'a filter', arguments)
                self._filters[name] = Filter(**arguments)
        self.columns = list(self._filters)
        """Columns that the filters name."""

    def samples_out(self, sample_id: str, dropped: Dropped) -> bool:
        """Return whether subsampling leaves a sample out, and count it in `dropped`."""
        # Salted, so that the choice is independent of the validation split, also chosen by hash.
        is_kept = xxhash.xxh64_intdigest(f'sample {sample_id}', seed=self._seed) / 2**64 < self._share
        if not is_kept:
            dropped.filtered['not in the sample'] += 1
        return not is_kept

    def filters_out(self, fields: Mapping[str, Any], where: str, dropped: Dropped) -> bool:
        """Return whether a filter leaves a sample out, and count it; a missing field raises a ConfigError."""
        for name, condition in self._filters.items():
            if not condition.keeps(field(fields, name, where), f'{where}: {name!r}'):
                dropped.filtered[f'filter {name}'] += 1
                return True
        return False
