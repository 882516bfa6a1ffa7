# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Bring an index up to date with its folder of images."""

import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Optional

from tqdm import tqdm

from llm2clip.config import ConfigError
from llm2clip.search.exported import PRECISIONS, ExportedModel, ImageBatch
from llm2clip.search.files import FileState, find_images
from llm2clip.search.index import About, Entry, Index

__all__ = ['Update', 'update_index']

UNREADABLE_FILE = 'unreadable.txt'
# How much work a kill may cost.
COMMIT_SECONDS = 1.0
# The state of a file that could not even be read: that of no file, so that the next call tries again.
_UNKNOWN = FileState(-1, -1)


@dataclass
class Update:
    """What `update_index` did."""

    images: int = 0
    """In the index now."""
    added: int = 0
    changed: int = 0
    removed: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Path -> why it could not be read, of those that this call tried."""
    known_unreadable: int = 0
    """Not tried again, since they could not be decoded and have not changed."""
    others: Counter[str] = field(default_factory=Counter)
    """Suffix -> files that are no images by their names."""

    def lines(self, names: int = 20) -> list[str]:
        """For people; at most so many unreadable images by name."""
        lines = [f'{self.images:,} images ({self.added:,} added, {self.changed:,} changed, {self.removed:,} removed)']
        if self.unreadable:
            lines.append(f'{len(self.unreadable):,} unreadable, all of them in {UNREADABLE_FILE} of the index:')
            lines += [f'  {path} {reason}' for path, reason in list(self.unreadable.items())[:names]]
            if len(self.unreadable) > names:
                lines.append('  …')
        if self.known_unreadable:
            lines.append(f'{self.known_unreadable:,} unreadable as before, see {UNREADABLE_FILE} of the index')
        if self.others:
            kinds = ', '.join(f'{number:,} {suffix}' for suffix, number in self.others.most_common(5))
            lines.append(f'{self.others.total():,} other files left out ({kinds})')
        return lines


def update_index(
    index: Index,
    model: ExportedModel,
    images: str,
    precision: Optional[str] = None,
    batch_size: int = 64,
    num_workers: int = 2,
    replace: bool = False,
) -> Update:
    """Embed the images that are new or have changed, and forget those that are gone.

    What is done when the process ends, however it does, is not done again by the next call.

    Args:
        index: May be empty.
        model: Embeds the images.
        images: Folder of the images, with those in it.
        precision: ``fp32`` or ``amp_bf16``; unset, that of the index, and ``fp32`` for a new one.
        batch_size: Images per forward pass.
        num_workers: Processes that read and decode.
        replace: Discard an index of another model, folder or precision.

    Raises:
        ConfigError: The folder has no images, the index is of something else, or another process writes it.
    """
    if precision not in (None, *PRECISIONS):
        raise ConfigError(f'precision: {precision!r} is not one of {", ".join(PRECISIONS)}')
    with index.writing():
        found = find_images(images)
        if precision is None:
            precision = about.precision if (about := index.about()) is not None else 'fp32'
        index.claim(About(os.path.abspath(images), model.fingerprint, str(model.folder), precision), replace)
        before = index.states()
        todo = {path: state for path, state in found.images.items()
                if path not in before or before[path][0] != state}
        gone = before.keys() - found.images.keys()
        index.remove(gone)
        tried: dict[str, str] = {}
        if todo:
            index.finished = False
            batches = model.embed_images(images, list(todo), precision, batch_size, num_workers)
            tried = _put_batches(index, batches, todo, len(found.images))
        if not index.finished:
            index.finished = True
        now = index.states() if todo or gone else before
        unreadable = {path: error for path, (_, error) in now.items() if error is not None}
        lines = ''.join(f'{path}\t{reason}\n' for path, reason in sorted(unreadable.items()))
        (index.folder / UNREADABLE_FILE).write_text(lines, encoding='utf-8', errors='surrogateescape')
    done = todo.keys() - unreadable.keys()
    return Update(len(now) - len(unreadable), len(done - before.keys()), len(done & before.keys()), len(gone),
                  tried, len(unreadable) - len(tried), found.others)


def _put_batches(
    index: Index, batches: Iterable[ImageBatch], todo: dict[str, FileState], total: int
) -> dict[str, str]:
    """Store vectors as they come; returns those that could not be read, and why."""
    paths = list(todo)
    unreadable: dict[str, str] = {}
    waiting: list[Entry] = []
    committed = time.monotonic()
    with tqdm(total=total, initial=total - len(todo), desc='index', unit=' images') as progress:
        try:
            for batch in batches:
                for place, vector in zip(batch.places, batch.vectors):
                    waiting.append(Entry(paths[place], todo[paths[place]], vector))
                for place, why in batch.unreadable.items():
                    unreadable[paths[place]] = why.reason
                    state = todo[paths[place]] if why.lasting else _UNKNOWN
                    waiting.append(Entry(paths[place], state, error=why.reason))
                progress.update(len(batch.places) + len(batch.unreadable))
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    index.put(waiting)
                    waiting, committed = [], time.monotonic()
        finally:
            index.put(waiting)
    return unreadable
