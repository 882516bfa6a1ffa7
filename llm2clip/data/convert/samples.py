# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a data source gives: samples, in parts that can be converted one by one, which of them are wanted, and what it
leaves out."""

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
from llm2clip.config.ranges import Finite, HeldOut, Text
from llm2clip.data.caption_files import check_text, normal_path, optional_text
from llm2clip.data.caption_files import field as field_of
from llm2clip.data.images import image_size
from llm2clip.files import FileError, reading
from llm2clip.folders import inside
from llm2clip.registry import check_arguments

__all__ = [
    'Dropped', 'Filters', 'HELDOUT', 'IMAGE_FIELDS', 'Part', 'Sample', 'SampleShare', 'Selection', 'Splits',
    'check_folder', 'check_split', 'hold_out', 'is_held_out', 'listed_captions', 'matching_files', 'one_part',
    'read_image', 'sample_name',
]


IMAGE_FIELDS = ('__width__', '__height__', '__aspect__')
"""What a filter may name besides columns: the image's own width and height in pixels, turned upright, and its longer
side divided by its shorter one."""
Filters = dict[Text, dict[Text, Any]]
SampleShare = Annotated[float, Field(gt=0, le=1)]


@dataclass
class Sample:
    """One sample of a dataset."""

    sample_id: str
    captions: dict[str, str]
    """Caption key -> text; every sample of a dataset has the same keys.  A caption that is absent is empty."""
    image: Union[bytes, None] = None
    """Encoded image; None in caption datasets."""
    required: tuple[str, ...] = ()
    """Keys of captions without which the source has no use for the sample."""


@dataclass
class Dropped:
    """What was left out: reason -> sample ids, or the paths of missing files."""

    reasons: dict[str, list[str]] = field(default_factory=dict)
    filtered: Counter[str] = field(default_factory=Counter)
    """Reason -> how many samples the user's own settings leave out; `max_dropped` does not concern them."""
    tables: Counter[str] = field(default_factory=Counter)
    """Of tables whose captions images elsewhere get: ``rows``, and of these those ``without_key`` and ``repeated``."""
    left_out: list[str] = field(default_factory=list)
    """Ids that `leave_out` names, which are counted in `filtered` too."""

    def add(self, reason: str, sample_id: str) -> None:
        self.reasons.setdefault(reason, []).append(sample_id)

    def update(self, other: 'Dropped') -> None:
        for reason, ids in other.reasons.items():
            self.reasons.setdefault(reason, []).extend(ids)
        self.filtered.update(other.filtered)
        self.left_out += other.left_out

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

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
    """That decide its samples, such as a tar or that of the captions; images are not among them."""


Splits = dict[str, list[Part]]
HELDOUT = 'heldout'
"""Name of the split of what is held out."""


def one_part(samples: Iterable[Sample], *files: str) -> list[Part]:
    """A split that is small enough to be converted in one go; `files` as for `Part`."""
    return [Part('all', lambda dropped: samples, files)]


def _hash(image: Union[str, bytes], seed: int) -> float:
    """From 0 to 1, the same for all spellings of a path."""
    return xxhash.xxh64_intdigest(normal_path(image) if isinstance(image, str) else image, seed=seed) / 2**64


def is_held_out(image: Union[str, bytes], share: float, seed: int = 0) -> bool:
    """Whether an image is in the held-out part, which depends on no other image.

    Args:
        image: Its id or path, or its bytes.
        share: Of the images that are held out.
        seed: Which ones.
    """
    return _hash(image, seed) < share


def check_split(split: str, heldout: HeldOut) -> None:
    """Raise a ConfigError if the other split has the name of one that is held out."""
    if split in (heldout if isinstance(heldout, dict) else [HELDOUT] if heldout else []):
        raise ConfigError(f'source.split: {split!r} is the name of the held-out split; give the other one another name')


def hold_out(images: Iterable[str], heldout: HeldOut, seed: int, split: str = 'train') -> dict[str, list[str]]:
    """Split -> ids of its images in their order: `split`, and what is held out, which is chosen by the hash of the id.

    With more images, a share moves none of them.  A number may move some out of what is held out and never one into it,
    so that no image that was trained on is measured later.

    Args:
        images: All ids, each once.
        heldout: Which share is held out, between 0 and 1, by `is_held_out`, or how many, those with the smallest
            hashes, as the split ``heldout``; or the names of several splits -> how many images each of them holds.
        seed: Which ones.
        split: Name of the other split.

    Raises:
        ConfigError: `heldout` is none of these, a split would be empty, or two would have one name.
    """
    check_split(split, heldout)
    images = list(images)
    if not heldout:
        return {split: images}
    counts = heldout if isinstance(heldout, dict) else {HELDOUT: heldout}
    if isinstance(heldout, float) and 0 < heldout < 1:
        counts = {HELDOUT: sum(is_held_out(image, heldout, seed) for image in images)}
        if counts[HELDOUT] in (0, len(images)):
            raise ConfigError(f'source.heldout: a share of {heldout} of {len(images)} images, chosen by their hash, '
                              f'is {counts[HELDOUT]} of them; give another share or seed')
    if not all(isinstance(n, int) and n > 0 for n in counts.values()) or sum(counts.values()) >= len(images):
        raise ConfigError(f'source.heldout: got {heldout!r}, expected a share between 0 and 1, or a number of images '
                          f'below {len(images)}, which is how many there are')
    ranked = iter(sorted(images, key=lambda image: (_hash(image, seed), image)))
    split_of = {image: name for name, count in counts.items() for image in islice(ranked, int(count))}
    return {name: [image for image in images if split_of.get(image, split) == name] for name in (split, *counts)}


def check_folder(images: str) -> None:
    """Raise a ConfigError unless there is such a folder of images."""
    if not Path(images).is_dir():
        raise ConfigError(f'source.images: there is no folder {Path(images).absolute()}')


def read_image(
    images: Optional[str], name: str, where: str, dropped: Dropped, also: Sequence[str] = ()
) -> Optional[bytes]:
    """The file of an image, or None after counting it as missing.

    Args:
        images: The folder that the image has to be in; without one, `name` may be any path.
        name: Path of the image in it.
        where: Which sample names it, for messages.
        dropped: Receives it if there is no such file.
        also: Other folders in which it may be.

    Raises:
        FileError: It is outside of the folder, or cannot be read.
    """
    path = Path(name) if images is None else inside(images, name, where, also)
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


def listed_captions(value: Any, keys: Sequence[str], where: str) -> dict[str, str]:
    """Captions of a text, or of a list of texts, by their keys; those that are absent are empty.

    Raises:
        FileError: There are more than keys, or one is no text.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > len(keys):
        raise FileError(f'{where} has {len(values)} texts, expected at most {len(keys)}')
    return {**dict.fromkeys(keys, ''), **{key: optional_text(text, where) for key, text in zip(keys, values)}}


def matching_files(files: Union[str, Sequence[str]], key: str = 'source.files') -> list[str]:
    """The files that match paths or patterns, those of each pattern in the order of their names.

    Args:
        files: The paths or patterns.
        key: Where they stand in the configuration.

    Raises:
        ConfigError: A pattern matches none.
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


# ---------------------------------------------------------------------------------------------------------------------
# Which samples are wanted
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filter:
    """What a column has to hold: a number in a range, or one of some values."""

    min: Optional[Finite] = None
    """Smallest number that is kept."""
    max: Optional[Finite] = None
    """Largest number that is kept."""
    values: Optional[Annotated[list[Union[Text, int, bool]], Field(min_length=1)]] = None
    """The values that are kept, compared as texts: true is ``true``, and 1 is ``1``."""

    def keeps(self, value: Any, where: str) -> Optional[bool]:
        """Whether a value is kept; None if there is none: null, an empty text, or NaN.

        Raises:
            FileError: It is to be a number, and is none.
        """
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
        filters: Column, or one of `IMAGE_FIELDS` -> the fields of a `Filter`.  A sample without a value is left out.
        share: Part of the samples that is kept, from 0 to 1, chosen by the hash of their ids, so that it depends on no
            other sample and on no order; a smaller part is inside a larger one of the same seed.
        seed: Which ones.

    Raises:
        ConfigError: A filter has an argument that there is not, none, both a range and values, or an empty range.
    """

    def __init__(self, filters: Optional[Mapping[str, Mapping[str, Any]]] = None, share: float = 1.0, seed: int = 0):
        self._share, self._seed = share, seed
        self.columns: dict[str, Filter] = {}
        """Filters by columns."""
        self.by_image: dict[str, Filter] = {}
        """Filters by the image's size."""
        for name, arguments in (filters or {}).items():
            key = f'source.filters.{name}'
            check_arguments(Filter, 'a filter', arguments, key)
            made = Filter(**arguments)
            is_range = made.min is not None or made.max is not None
            if is_range is (made.values is not None):
                raise ConfigError(f'{key}: expected min, max or both of a number, or the values that are kept')
            if made.min is not None and made.max is not None and made.min > made.max:
                raise ConfigError(f'{key}: min is {made.min} and max is {made.max}, expected the smaller value first')
            if made.values is not None and name in IMAGE_FIELDS:
                raise ConfigError(f'{key}: expected min, max or both of a number')
            (self.by_image if name in IMAGE_FIELDS else self.columns)[name] = made

    def samples_out(self, sample_id: str, dropped: Dropped) -> bool:
        """Whether a sample is not in the part that is kept, after counting it."""
        # Salted, since what is held out is chosen by the hash of an id as well.
        out = xxhash.xxh64_intdigest(f'sample {sample_id}', seed=self._seed) / 2**64 >= self._share
        dropped.filtered.update(['not in the sample'] if out else ())
        return out

    def filters_out(self, fields: Mapping[str, Any], where: str, dropped: Dropped) -> bool:
        """Whether a filter leaves a sample out, by its columns, after counting it under the first that does.

        Raises:
            ConfigError: There is no such column.
            FileError: A value that should be a number is none.
        """
        return any(_leaves_out(name, made, field_of(fields, name, where), where, dropped)
                   for name, made in self.columns.items())

    def filters_image_out(self, image: bytes, sample_id: str, dropped: Dropped) -> bool:
        """`filters_out` by the size of the image; one that cannot be decoded stays, for the writer to count."""
        if not self.by_image:
            return False
        try:
            width, height = image_size(image, sample_id)
        except ValueError:
            return False
        aspect = max(width, height) / max(min(width, height), 1)
        values: dict[str, float] = dict(zip(IMAGE_FIELDS, (width, height, aspect)))
        return any(_leaves_out(name, made, values[name], sample_id, dropped) for name, made in self.by_image.items())


def _leaves_out(name: str, made: Filter, value: Any, where: str, dropped: Dropped) -> bool:
    keeps = made.keeps(value, f'{where}: {name!r}')
    if not keeps:
        dropped.filtered[f'filter {name}' if keeps is False else f'filter {name}: no value'] += 1
    return not keeps
