# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The card of a dataset: how many captions it has and how long they are, and a picture of some samples."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from llm2clip.data.images import decode_image
from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column, read_columns, read_index, whole_shard
from llm2clip.remotes import OutputFolder

__all__ = ['CaptionCounts', 'draw_card', 'drawing']

# Captions of this many words or more count together.
_LENGTHS = 257
_ROWS, _COLUMNS = 2, 6


@dataclass
class CaptionCounts:
    """How many captions some samples have, and how long they are."""

    words: dict[str, Counter[int]] = field(default_factory=dict)
    """Caption key -> number of words -> captions; those of 0 words are absent."""
    per_sample: Counter[int] = field(default_factory=Counter)
    """Number of captions -> samples that have so many."""

    def add(self, captions: Mapping[str, str]) -> None:
        """Count one sample."""
        for key, text in captions.items():
            self.words.setdefault(key, Counter())[min(len(text.split()), _LENGTHS - 1)] += 1
        self.per_sample[sum(map(bool, captions.values()))] += 1

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Add the counts of other samples, their `vars` after a way through JSON, whose keys are texts."""
        for key, counts in record['words'].items():
            self.words.setdefault(key, Counter()).update({int(n): count for n, count in counts.items()})
        self.per_sample.update({int(n): count for n, count in record['per_sample'].items()})

    def summary(self) -> dict[str, dict[str, int]]:
        """Caption key -> how many there are, how many samples lack one, and quantiles of their words."""
        result = {}
        for key, counts in self.words.items():
            words = [n for n in counts if n]
            result[key] = {'captions': counts.total() - counts[0], 'absent': counts[0]}
            for percent in (5, 50, 95) if words else ():
                result[key][f'words_p{percent}'] = int(np.quantile(
                    words, percent / 100, weights=[counts[n] for n in words], method='inverted_cdf'))
        return result


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Print a warning that names the picture in place of an error; a `$` in a text is drawn as it is."""
    try:
        # With a salt, the same picture is the same bytes as SVG.
        with matplotlib.rc_context({'text.parse_math': False, 'svg.hashsalt': 'llm2clip'}):
            yield
    except Exception as error:  # layout, fonts and backends raise errors of any kind
        print(f'warning: {name} was not drawn: {error!r}', flush=True)


def drawable(text: str) -> str:
    """The text on one line, with `…` in place of characters that matplotlib's font lacks, as those of Japanese."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return re.sub('…+', '…', ''.join(char if ord(char) in glyphs else '…' for char in ' '.join(text.split())))


def draw_card(out: OutputFolder, split: str, counts: CaptionCounts, name: str) -> None:
    """Draw the lengths of a split's captions, and some of its images, each under the beginning of its first caption.

    Args:
        out: Folder of the splits.
        split: The split.
        counts: Of its captions.
        name: Of the picture in `out`.
    """
    shards = read_index(out.local / split)['shards']
    images: list[dict[str, Any]] = []
    if not shards[0]['compression'] and IMAGE in read_columns(out.local / split):
        shard = shards[len(shards) // 2]
        file = f'{split}/{shard["raw_data"]["basename"]}'
        was_here = (out.local / file).is_file()
        out.fetch(file)
        reader = whole_shard(out.local / split, shard)
        images = [reader[int(i)] for i in np.unique(np.linspace(0, len(reader) - 1, _ROWS * _COLUMNS).astype(int))]
        if not was_here:
            (out.local / file).unlink()
    rows = -(-len(images) // _COLUMNS)
    figure = Figure(figsize=(16, 3 + 2.8 * rows), layout='constrained')
    figure.suptitle(f'{out.local.name}, {split}: {counts.per_sample.total():,} samples')
    grid = figure.add_gridspec(1 + rows, _COLUMNS)
    axis = figure.add_subplot(grid[0, :])
    for key, words in counts.words.items():
        axis.plot(range(1, _LENGTHS), [words[n] for n in range(1, _LENGTHS)], label=key)
    axis.set(xlabel='words per caption', ylabel='captions')
    axis.legend(fontsize=7, ncols=1 + len(counts.words) // 12)
    for i, sample in enumerate(images):
        axis = figure.add_subplot(grid[1 + i // _COLUMNS, i % _COLUMNS])
        image = decode_image(sample[IMAGE], sample[SAMPLE_ID])
        image.thumbnail((256, 256))
        axis.imshow(image)
        axis.axis('off')
        text = next((text for key in counts.words if (text := sample[caption_column(key)])), '')
        axis.set_title('\n'.join(textwrap.wrap(drawable(text), 40, max_lines=2, placeholder=' …')), fontsize=7)
    figure.savefig(out.local / name, dpi=80)
    out.publish(name)
