# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which samples of a source are wanted: a stated part, and of that what filters keep, by columns and image sizes.

What is not wanted is counted in `Dropped.filtered`, under ``filter <name>``, ``filter <name>: no value`` and ``not in
the sample``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Optional, Union

import xxhash
from pydantic import Field

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Finite, Text
from llm2clip.data.caption_files import field
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.images import image_size
from llm2clip.files import FileError
from llm2clip.registry import check_arguments

__all__ = ['IMAGE_FIELDS', 'Filter', 'Filters', 'SampleShare', 'Selection']

IMAGE_FIELDS = ('__width__', '__height__', '__aspect__')
"""What a filter may name besides columns: the image's own width and height in pixels, turned upright, and its longer
side divided by its shorter one."""

Filters = dict[Text, dict[Text, Any]]
SampleShare = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Filter:
    """What a column has to hold: a number in a range, or one of some values."""

    min: Optional[Finite] = None
    """Smallest number that is kept."""
    max: Optional[Finite] = None
    """Largest number that is kept."""
    values: Optional[Annotated[list[Union[Text, int, bool]], Field(min_length=1)]] = None
    """The values that are kept, compared as texts: true is ``true``, and 1 is ``1``."""

    @classmethod
    def build(cls, name: str, arguments: Mapping[str, Any]) -> 'Filter':
        """A filter of the configuration, checked.

        Raises:
            ConfigError: It has an argument that there is not, none, both a range and values, or an empty range.
        """
        key = f'source.filters.{name}'
        check_arguments(cls, 'a filter', arguments, key)
        made = cls(**arguments)
        is_range = made.min is not None or made.max is not None
        if is_range is (made.values is not None):
            raise ConfigError(f'{key}: expected min, max or both of a number, or the values that are kept')
        if made.min is not None and made.max is not None and made.min > made.max:
            raise ConfigError(f'{key}: min is {made.min} and max is {made.max}, expected the smaller value first')
        if made.values is not None and name in IMAGE_FIELDS:
            raise ConfigError(f'{key}: expected min, max or both of a number')
        return made

    def keeps(self, value: Any, where: str) -> Optional[bool]:
        """Whether a value is kept; None if there is none: null, an empty text, or NaN.

        Raises:
            FileError: It is to be a number, and is none.
        """
        if value is None or isinstance(value, str) and not value.strip():
            return None
        if self.values is not None:
            return _as_text(value) in map(_as_text, self.values)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise FileError(f'{where} is {str(value)[:60]!r}, expected a number') from None
        if math.isnan(number):
            return None
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Selection:
    """Which samples of a source are wanted.

    Args:
        filters: Column, or one of `IMAGE_FIELDS` -> the fields of a `Filter`.  A sample without a value is left out.
        share: Part of the samples that is kept, from 0 to 1, chosen by the hash of their ids, so that it depends on no
            other sample and on no order; a smaller part is inside a larger one of the same seed.
        seed: Which ones.

    Raises:
        ConfigError: A filter is not as `Filter.build` expects it.
    """

    def __init__(self, filters: Optional[Mapping[str, Mapping[str, Any]]] = None, share: float = 1.0, seed: int = 0):
        built = {name: Filter.build(name, arguments) for name, arguments in (filters or {}).items()}
        self._share, self._seed = share, seed
        self._columns = {name: made for name, made in built.items() if name not in IMAGE_FIELDS}
        self._image = {name: made for name, made in built.items() if name in IMAGE_FIELDS}

    @property
    def columns(self) -> list[str]:
        """Those that filters read."""
        return list(self._columns)

    @property
    def reads_images(self) -> bool:
        """Whether a filter is by the image's size."""
        return bool(self._image)

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
        return any(_leaves_out(name, made, field(fields, name, where), where, dropped)
                   for name, made in self._columns.items())

    def filters_image_out(self, image: bytes, sample_id: str, dropped: Dropped) -> bool:
        """`filters_out` by the size of the image; one that cannot be decoded stays, for the writer to count."""
        if not self._image:
            return False
        try:
            width, height = image_size(image, sample_id)
        except ValueError:
            return False
        aspect = max(width, height) / max(min(width, height), 1)
        values: dict[str, float] = dict(zip(IMAGE_FIELDS, (width, height, aspect)))
        return any(_leaves_out(name, made, values[name], sample_id, dropped) for name, made in self._image.items())


def _leaves_out(name: str, made: Filter, value: Any, where: str, dropped: Dropped) -> bool:
    keeps = made.keeps(value, f'{where}: {name!r}')
    if not keeps:
        dropped.filtered[f'filter {name}' if keeps is False else f'filter {name}: no value'] += 1
    return not keeps
