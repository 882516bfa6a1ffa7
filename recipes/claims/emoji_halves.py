# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Emoji of living things and food, and all the others: emoji_halves.py EMOJI OUT

Of the quickstart's emoji: `OUT/old_train` and `OUT/new_train` by the artist of its training, `OUT/old_test` and
`OUT/new_test` of the same concepts by the other artist.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_samples

OLD = ('animals & nature', 'food & drink', 'people & body', 'smileys & emotion')


def is_old(sample: dict[str, Any]) -> bool:
    return sample[f'{CAPTION}long'].endswith(tuple(f'an emoji of {category}' for category in OLD))


def samples(rows: Iterable[dict[str, Any]]) -> list[Sample]:
    return [Sample(row[SAMPLE_ID], {key: row[f'{CAPTION}{key}'] for key in ('short', 'long')}, row[IMAGE])
            for row in rows]


def main(emoji: str, out: str) -> None:
    splits = {}
    for part, name in (('train', 'train'), ('unseen_style', 'test')):
        rows = read_samples(Path(emoji, part))
        splits[f'old_{name}'] = one_part(samples(row for row in rows if is_old(row)))
        splits[f'new_{name}'] = one_part(samples(row for row in rows if not is_old(row)))
    write_splits(splits, Dropped(), out)


if __name__ == '__main__':
    main(*sys.argv[1:])
