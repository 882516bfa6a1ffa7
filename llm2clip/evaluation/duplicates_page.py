# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Near-copies to look at: pairs of pictures side by side, the most doubtful first."""

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Union

import numpy as np

from llm2clip.evaluation.duplicates import Found, Member, NearCopies
from llm2clip.evaluation.gallery import thumbnail
from llm2clip.evaluation.image_blocks import Images, ShownImage
from llm2clip.evaluation.page import picture, section, table, write_page
from llm2clip.evaluation.tables import Table

__all__ = ['write_duplicates_page']

_LARGE = 224


def write_duplicates_page(
    found: NearCopies, training: Sequence[Images], sets: Sequence[Images], n_shown: int, path: Union[str, Path]
) -> None:
    """Write `report.html`.

    Args:
        found: What was found.
        training, sets: As for `llm2clip.evaluation.duplicates.find_near_copies`.
        n_shown: Pairs that are shown of the training data, and of each evaluation set.
        path: The page.
    """
    images, first_set = [*training, *sets], len(training)
    kinds = {'Within the training data': [pair for pair in found.pairs if pair.second.where < first_set]}
    for where, one in enumerate(sets, first_set):
        kinds[f'{one.name} and the training data'] = [pair for member, pair in found.nearest.items()
                                                      if member.where == where]
    chosen = {title: _spread(pairs, n_shown) for title, pairs in kinds.items()}
    shown = _read({member for pairs in chosen.values() for pair in pairs for member in (pair.first, pair.second)},
                  images)
    write_page(path, 'Near-copies', [
        section('Counts', 'How many images of each training dataset and evaluation set are near to others.',
                table(_counts(found, images, first_set)) + table(_distances(kinds))),
        *(section(title, f'{len(pairs)} of {len(kinds[title]):,} pairs, from the most doubtful to the clearest.',
                  ''.join(_row(pair, images, shown) for pair in pairs)) for title, pairs in chosen.items() if pairs)])


def _counts(found: NearCopies, images: Sequence[Images], first_set: int) -> Table:
    left_out = Counter(member.where for member in found.leave_out)
    grouped = Counter(member.where for group in found.groups for member in group)
    close = Counter(member.where for member in found.nearest)
    rows = [[one.name, f'{one.size:,}', f'{grouped[where]:,}', f'{left_out[where]:,}'] if where < first_set else
            [one.name, f'{one.size:,}', f'{close[where]:,}', ''] for where, one in enumerate(images)]
    return Table('Counts', ['images of', 'all', 'near a training image', 'to leave out'], rows,
                 'to leave out: all but one of each group of training images, and those near to an image of an '
                 'evaluation set')


def _distances(kinds: dict[str, list[Found]]) -> Table:
    """How many pairs hashes have found, by the distance, from which a threshold can be chosen."""
    steps = range(0, 1 + max((pair.distance or 0 for pairs in kinds.values() for pair in pairs), default=0), 8)
    counts = {title: Counter(pair.distance // 8 for pair in pairs if pair.distance is not None)
              for title, pairs in kinds.items()}
    return Table('Distances', ['pairs', *(f'{step}–{step + 7} bits' for step in steps)],
                 [[title, *(f'{count[step // 8]:,}' for step in steps)] for title, count in counts.items()])


def _spread(pairs: Sequence[Found], n: int) -> list[Found]:
    """Up to `n` pairs from the whole range, the most doubtful first."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(n, len(pairs))).astype(int))
    return [pairs[i] for i in chosen[::-1]]


def _read(members: Iterable[Member], images: Sequence[Images]) -> dict[Member, ShownImage]:
    """The pictures, each block that has some opened once."""
    wanted: dict[int, dict[int, Member]] = {}
    for member in members:
        wanted.setdefault(member.where, {})[member.position] = member
    shown = {}
    for where, positions in wanted.items():
        start = 0
        for block in images[where].blocks:
            here = [at for at in positions if start <= at < start + block.size]
            if here:
                with block.open() as read:
                    shown.update({positions[at]: read(at - start) for at in here})
            start += block.size
    return shown


def _row(pair: Found, images: Sequence[Images], shown: dict[Member, ShownImage]) -> str:
    how = [] if pair.distance is None else [f'{pair.distance} bits']
    how += [] if pair.cosine is None else [f'cosine {pair.cosine:.3f}']
    tiles = ''.join(_tile(member, images, shown[member]) for member in (pair.first, pair.second))
    return f'<div class="row"><i>{", ".join(how)}</i><div class="tiles pair">{tiles}</div></div>'


def _tile(member: Member, images: Sequence[Images], image: ShownImage) -> str:
    name, caption = (html.escape(text) for text in (f'{images[member.where].name}: {member.image_id}', image.caption))
    return (f'<figure>{picture(thumbnail(image.data, image.image_id, _LARGE))}<figcaption><b title="{name}">{name}</b>'
            f'<br><span title="{caption}">{caption}</span></figcaption></figure>')
