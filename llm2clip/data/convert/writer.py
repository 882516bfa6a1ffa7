# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples -> MDS datasets that appear only when they are complete, with a card of what went in."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column
from llm2clip.data.transforms import decode_image
from llm2clip.folders import complete_folder

__all__ = ['CARD_FILE', 'Dropped', 'Sample', 'is_complete', 'write_splits']

CARD_FILE = 'dataset.json'


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
    """What a source left out: reason -> sample ids."""

    reasons: dict[str, list[str]] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    """Reason -> how many samples the user's own settings leave out; `max_dropped` does not concern them."""

    def add(self, reason: str, sample_id: str) -> None:
        self.reasons.setdefault(reason, []).append(sample_id)

    def filter(self, reason: str) -> None:
        self.filtered[reason] = self.filtered.get(reason, 0) + 1

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def counts(self) -> dict[str, int]:
        return {**{reason: len(ids) for reason, ids in self.reasons.items()}, **self.filtered}


def is_complete(folder: Union[str, Path]) -> bool:
    """Whether `write_splits` has finished in this folder."""
    return (Path(folder) / CARD_FILE).is_file()


def write_splits(
    splits: Mapping[str, Iterable[Sample]],
    dropped: Dropped,
    out: Union[str, Path],
    size_limit: Union[int, str] = '64mb',
    max_dropped: float = 0.02,
    about: Mapping[str, object] = {},
) -> dict[str, int]:
    """Write one MDS dataset a split, and `dataset.json` beside them.

    The folder appears under its name when everything is in it.  Every image is decoded to check it; a sample whose
    image does not decode or that has an empty caption is left out and counted.

    Args:
        splits: Name -> samples.
        dropped: What the source left out; what is left out here is added.
        out: The folder.
        size_limit: Largest shard.
        max_dropped: Share of the samples that may be left out.
        about: Further facts for the card.

    Returns:
        Samples written, a split.

    Raises:
        ValueError: Two samples have the same id, the captions' keys differ, a split is empty, or more samples were
            left out than `max_dropped` allows.
    """
    left_out_by_source = len(dropped)
    with complete_folder(out) as partial:
        written = {name: _write(name, samples, dropped, partial / name, size_limit) for name, samples in splits.items()}
        left_out = len(dropped) - left_out_by_source
        total = sum(written.values()) + left_out
        if left_out > max_dropped * total:
            examples = {reason: ids[:5] for reason, ids in dropped.reasons.items()}
            raise ValueError(f'{left_out} of {total} samples were left out, more than max_dropped={max_dropped} '
                             f'allows: {examples}')
        card = {**about, 'samples': written, 'dropped': dropped.counts(), 'dropped_ids': dropped.reasons}
        (partial / CARD_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False) + '\n')
    return written


def _write(name: str, samples: Iterable[Sample], dropped: Dropped, out: Path, size_limit: Union[int, str]) -> int:
    checked = _checked(samples, dropped)
    first = next(checked, None)
    if first is None:
        raise ValueError(f'split {name!r} has no samples (left out: {dropped.counts()})')
    columns = {SAMPLE_ID: 'str', **({IMAGE: 'bytes'} if first.image is not None else {}),
               **{caption_column(key): 'str' for key in first.captions}}
    seen: Counter[str] = Counter()
    with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=size_limit) as writer:
        for sample in tqdm(_chain(first, checked), desc=f'write {name}', unit=' samples'):
            seen[sample.sample_id] += 1
            if seen[sample.sample_id] > 1:
                raise ValueError(f'sample id {sample.sample_id!r} occurs twice in split {name!r}')
            if sample.captions.keys() != first.captions.keys():
                raise ValueError(f'sample {sample.sample_id!r} has captions {sorted(sample.captions)}, expected '
                                 f'{sorted(first.captions)}')
            row = {SAMPLE_ID: sample.sample_id, **{caption_column(k): text for k, text in sample.captions.items()}}
            writer.write({**row, **({IMAGE: sample.image} if sample.image is not None else {})})
    return sum(seen.values())


def _checked(samples: Iterable[Sample], dropped: Dropped) -> Iterator[Sample]:
    for sample in samples:
        if not all(text.strip() for key, text in sample.captions.items() if key not in sample.may_be_empty):
            dropped.add('empty caption', sample.sample_id)
            continue
        if sample.image is not None:
            try:
                decode_image(sample.image, sample.sample_id)
            except ValueError:
                dropped.add('undecodable image', sample.sample_id)
                continue
        yield sample


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest
