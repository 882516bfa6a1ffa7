# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a data source gives: samples, in parts that can be converted one by one, and what it leaves out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from llm2clip.config import ConfigError

__all__ = ['Dropped', 'Part', 'Sample', 'Splits', 'check_files', 'one_part']


@dataclass
class Sample:
    """One sample of a dataset."""

    sample_id: str
    captions: dict[str, str]
    """Caption key -> text; every sample of a dataset has the same keys."""
    image: Union[bytes, None] = None
    """Encoded image; None in caption datasets."""
    may_be_empty: tuple[str, ...] = ()
    """Keys of captions that this sample may lack."""


@dataclass
class Dropped:
    """What was left out: reason -> sample ids."""

    reasons: dict[str, list[str]] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    """Reason -> how many samples the user's own settings leave out; `max_dropped` does not concern them."""

    def add(self, reason: str, sample_id: str) -> None:
        self.reasons.setdefault(reason, []).append(sample_id)

    def filter(self, reason: str, count: int = 1) -> None:
        self.filtered[reason] = self.filtered.get(reason, 0) + count

    def update(self, other: 'Dropped') -> None:
        for reason, ids in other.reasons.items():
            self.reasons.setdefault(reason, []).extend(ids)
        for reason, count in other.filtered.items():
            self.filter(reason, count)

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def counts(self) -> dict[str, int]:
        return {**{reason: len(ids) for reason, ids in self.reasons.items()}, **self.filtered}


@dataclass
class Part:
    """A piece of a split, usually one input file: the unit that is converted by one process, or again after a kill."""

    name: str
    """Of its folder; the same whenever the source is read again."""
    read: Callable[[Dropped], Iterable[Sample]]
    """Yields the samples and adds what it leaves out."""


Splits = dict[str, list[Part]]


def one_part(samples: Iterable[Sample]) -> list[Part]:
    """A split that is small enough to be converted in one go."""
    return [Part('all', lambda dropped: samples)]


def check_files(files: Sequence[str]) -> None:
    """Raise a ConfigError unless there are input files, and all of them exist."""
    if not files:
        raise ConfigError('source.files: expected at least one file')
    for name in files:
        if not Path(name).is_file():
            raise ConfigError(f'source.files: there is no file {name}')
