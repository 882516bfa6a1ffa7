# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a data source gives: samples, in parts that are converted one by one, and what it leaves out."""

import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional, Union

import xxhash
from pydantic import Field

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Finite, Holdout, Text
from llm2clip.data.caption_files import check_text, normal_path
from llm2clip.data.caption_files import field as field_of
from llm2clip.files import FileError, reading
from llm2clip.folders import inside
from llm2clip.registry import check_arguments

__all__ = [
    'Dropped', 'Filters', 'Part', 'Sample', 'Selection', 'check_folder', 'holdout_splits', 'is_in_holdout',
    'matching_files', 'one_part', 'read_image', 'sample_name', 'split_holdout',
]

Filters = dict[Text, dict[Text, Any]]
_VAL = 'val'
_SAME_NAME = 'source.split: {!r} is the name of the held-out split; give the other one another name'


@dataclass
class Sample:
    """One sample of a dataset."""

    sample_id: str
    captions: dict[str, str]
    """Caption key -> text; every sample of a dataset has the same keys.  A caption that is absent is empty."""
    image: Union[bytes, None] = None
    """Encoded image; None in caption datasets."""


@dataclass
class Dropped:
    """What was left out: reason -> sample ids, or the paths of missing files."""

    reasons: dict[str, list[str]] = field(default_factory=dict)
    filtered: Counter[str] = field(default_factory=Counter)
    """Reason -> how many samples the user's own settings leave out; `max_dropped` does not concern them."""

    def add(self, reason: str, *sample_ids: str) -> None:
        self.reasons.setdefault(reason, []).extend(sample_ids)

    def counts(self) -> dict[str, int]:
        return {reason: len(ids) for reason, ids in self.reasons.items()}


@dataclass
class Part:
    """A piece of a split, usually one input file: the unit that is converted by one process, or again after a kill."""

    name: str
    """The same whenever the source is read again; its folder is called ``part-<name>``."""
    read: Callable[[Dropped], Iterable[Sample]]
    """Yields the samples and adds what it leaves out."""
    files: Sequence[str] = ()
    """Those that decide its samples, such as a tar or the file of the captions, but not the images."""


def one_part(samples: Iterable[Sample]) -> list[Part]:
    """A split that is small enough to be converted in one go."""
    return [Part('all', lambda dropped: samples)]


def _hash(image: Union[str, bytes], seed: int) -> float:
    """From 0 to 1, the same for all spellings of a path."""
    return xxhash.xxh64_intdigest(normal_path(image) if isinstance(image, str) else image, seed=seed) / 2**64


def is_in_holdout(image: Union[str, bytes], share: float, seed: int = 0) -> bool:
    """Whether an image, given by its id, path or bytes, is in a held-out share, which depends on no other image."""
    return _hash(image, seed) < share


def holdout_splits(split: str, share: float) -> dict[str, bool]:
    """Split -> whether it has what is held out: `split`, and ``val`` unless the share is 0.

    Raises:
        ConfigError: Both have one name.
    """
    if share and split == _VAL:
        raise ConfigError(_SAME_NAME.format(split))
    return {split: False, _VAL: True} if share else {split: False}


def split_holdout(images: Iterable[str], holdout: Holdout, seed: int, split: str = 'train') -> dict[str, list[str]]:
    """Split -> ids of its images in their order: `split`, and what is held out, which is chosen by the hash of the id.

    With more images, a share moves none of them.  A number may move some out of what is held out and never one into it,
    so that no image that was trained on is measured later.

    Args:
        images: All ids, each once.
        holdout, seed: A share between 0 and 1 or a number of images, those with the smallest hashes, which become the
            split ``val``; or split -> number of its images.
        split: Name of the other split.

    Raises:
        ConfigError: A split would be empty, or two would have one name.
    """
    images = list(images)
    counts = holdout if isinstance(holdout, dict) else {_VAL: holdout} if holdout else {}
    if split in counts:
        raise ConfigError(_SAME_NAME.format(split))
    if not counts:
        return {split: images}
    if isinstance(holdout, float) and 0 < holdout < 1:
        counts = {_VAL: sum(is_in_holdout(image, holdout, seed) for image in images)}
    if not all(isinstance(n, int) and n > 0 for n in counts.values()) or sum(counts.values()) >= len(images):
        raise ConfigError(f'source.holdout: got {holdout!r}, expected a share between 0 and 1, or a number of images, '
                          f'by which each split has some of the {len(images)} images')
    ranked = iter(sorted(images, key=lambda image: (_hash(image, seed), image)))
    split_of = {image: name for name, count in counts.items() for image in islice(ranked, int(count))}
    return {name: [image for image in images if split_of.get(image, split) == name] for name in (split, *counts)}


def check_folder(images: str) -> None:
    """Raise a ConfigError unless there is such a folder of images."""
    if not Path(images).is_dir():
        raise ConfigError(f'source.images: there is no folder {Path(images).absolute()}')


def read_image(folders: Sequence[str], name: str, where: str, dropped: Dropped) -> Optional[bytes]:
    """The file of an image, or None after counting it as missing.

    Its path is relative to the first of the folders; if it leads out of all of them, that is a FileError, which says
    `where` it is named.  Without folders, it may lead anywhere.
    """
    path = inside(folders[0], name, where, folders[1:]) if folders else Path(name)
    if not os.path.isfile(path):
        dropped.add('missing image file', str(path.absolute()))
        return None
    with reading(path, 'an image'):
        return path.read_bytes()


def sample_name(value: Any, where: str) -> str:
    """A sample's id from a text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise FileError(f'{where} is {value!r}, expected a text or a whole number')
    return check_text(str(value), where)


def matching_files(files: Union[str, Sequence[str]], key: str = 'source.files') -> list[str]:
    """The files that match paths or patterns, those of each pattern in the order of their names.

    A ConfigError, which names the `key` of the configuration, says which pattern matches none.
    """
    patterns = [files] if isinstance(files, str) else files
    if not patterns:
        raise ConfigError(f'{key}: expected at least one file')
    found = []
    for pattern in patterns:
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not paths:
            raise ConfigError(f'{key}: no file matches {Path(pattern).absolute()}')
        found += [check_text(path, f'{key}: {path!r}') for path in paths]
    return found


@dataclass(frozen=True)
class Filter:
    """What a column has to hold: a number in a range, or one of some values."""

    min: Optional[Finite] = None
    max: Optional[Finite] = None
    values: Optional[Annotated[list[Union[Text, int, bool]], Field(min_length=1)]] = None
    """The values that are kept, compared as texts: true is ``true``, and 1 is ``1``."""

    def keeps(self, value: Any, where: str) -> Optional[bool]:
        """Whether a value is kept; None if there is none: null, an empty text, or NaN.  FileError: It is no number."""
        if value is None or isinstance(value, str) and not value.strip():
            return None
        if self.values is not None:
            text, *kept = [str(x).lower() if isinstance(x, bool) else str(x) for x in (value, *self.values)]
            return text in kept
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise FileError(f'{where} is {str(value)[:60]!r}, expected a number') from None
        if math.isnan(number):
            return None
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)


class Selection:
    """Which samples of a source are wanted.

    Args:
        filters: Column -> the fields of a `Filter`.  A sample without a value is left out.
        share: Part of the samples that is kept, from 0 to 1, chosen by the hash of their ids, so that it depends on no
            other sample and on no order; a smaller part is inside a larger one of the same seed.
        seed: Which ones.

    Raises:
        ConfigError: A filter has an unknown argument, none, both a range and values, or an empty range.
    """

    def __init__(self, filters: Optional[Filters] = None, share: float = 1.0, seed: int = 0) -> None:
        if share > 1:
            raise ConfigError(f'source.sample: {share}, expected at most 1')
        self._share, self._seed = share, seed
        self._filters: dict[str, Filter] = {}
        for name, arguments in (filters or {}).items():
            key = f'source.filters.{name}'
            check_arguments(Filter, 'a filter', arguments, key)
            made = self._filters[name] = Filter(**arguments)
            is_range = made.min is not None or made.max is not None
            if is_range is (made.values is not None):
                raise ConfigError(f'{key}: expected min, max or both of a number, or the values that are kept')
            if made.min is not None and made.max is not None and made.min > made.max:
                raise ConfigError(f'{key}: min is {made.min} and max is {made.max}, expected the smaller value first')
        self.columns = list(self._filters)
        """Those that filters name."""

    def samples_out(self, sample_id: str, dropped: Dropped) -> bool:
        """Whether a sample is not in the part that is kept, after counting it."""
        # Salted, since what is held out is chosen by the hash of an id as well.
        out = xxhash.xxh64_intdigest(f'sample {sample_id}', seed=self._seed) / 2**64 >= self._share
        dropped.filtered.update(['not in the sample'] if out else ())
        return out

    def filters_out(self, fields: Mapping[str, Any], where: str, dropped: Dropped) -> bool:
        """Whether a filter leaves a sample out, after counting it; errors say that a value is missing or no number."""
        for name, kept in self._filters.items():
            keeps = kept.keeps(field_of(fields, name, where), f'{where}: {name!r}')
            if not keeps:
                dropped.filtered[f'filter {name}' if keeps is False else f'filter {name}: no value'] += 1
                return True
        return False
