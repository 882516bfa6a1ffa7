# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The card of a dataset: numbers in JSON, and a picture of what is in it."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from llm2clip.data.images import decode_image
from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column, read_columns, read_index, whole_shard
from llm2clip.drawing import drawable, drawing
from llm2clip.folders import OutputFolder

__all__ = ['CaptionCounts', 'write_card']

# Captions of this many words or more count together.
_LENGTHS = 257
_ROWS, _COLUMNS, _SHARDS = 4, 6, 8
# Pixels: each side of a square that holds an image and, above it, a caption; height of the caption's two lines.
_CELL, _TITLE = 210, 36
_ROW_COUNTS = ('without_key', 'repeated', 'with_image', 'without_image')


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

    def present(self, key: str) -> int:
        """Captions of a key."""
        return self.words[key].total() - self.words[key][0]

    def summary(self) -> dict[str, dict[str, int]]:
        """Caption key -> how many there are, how many samples lack one, and quantiles of their words."""
        return {key: {'captions': self.present(key), 'absent': counts[0],
                      **{f'words_p{q}': self._quantile(key, q) for q in (5, 50, 95) if self.present(key)}}
                for key, counts in self.words.items()}

    def _quantile(self, key: str, percent: int) -> int:
        words, captions = zip(*((n, captions) for n, captions in self.words[key].items() if n))
        return int(np.quantile(words, percent / 100, weights=captions, method='inverted_cdf'))


def write_card(out: OutputFolder, card: Mapping[str, Any], captions: Mapping[str, CaptionCounts], name: str) -> None:
    """Write `dataset.png`, then the card's JSON, which says that the dataset is complete.

    Args:
        out: Folder of the splits.
        card: What the JSON holds, less the counts of captions: `samples`, `dropped` and `filtered` are drawn, and so is
            `tables` if it is there.
        captions: Split -> what they are like.
        name: Of the JSON file.
    """
    counts = {'captions': {split: found.summary() for split, found in captions.items()},
              'captions_per_sample': {split: dict(sorted(found.per_sample.items()))
                                      for split, found in captions.items()}}
    with drawing(str(out.local / 'dataset.png')):
        _picture(out, captions, card)
        out.publish('dataset.png')
    out.commit(name, json.dumps({**card, **counts}, indent=2, ensure_ascii=False) + '\n')


def _picture(out: OutputFolder, captions: Mapping[str, CaptionCounts], card: Mapping[str, Any]) -> None:
    split, counts = next(iter(captions.items()))
    images = [sample for sample in _spread(out, split, _ROWS * _COLUMNS) if IMAGE in sample]
    went = _where_samples_went(card)
    # Room for one line per key.
    top = max(2.6, 0.17 * max(len(counts.words), len(went)) + 0.8)
    heights = [top, 2.6 * -(-len(images) // _COLUMNS)] if images else [top]
    figure = Figure(figsize=(16, sum(heights)), layout='constrained')
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    figure.suptitle(f'{out.local.name}, {split}: {counts.per_sample.total():,} samples')
    _draw_lengths(figure.add_subplot(grid[0, :2]), counts)
    _draw_presence(figure.add_subplot(grid[0, 2]), counts)
    _draw_per_sample(figure.add_subplot(grid[0, 3]), counts)
    _draw_counts(figure.add_subplot(grid[0, 4:]), went)
    if images:
        _draw_images(figure.add_subplot(grid[1, :]), images, list(counts.words))
    figure.savefig(out.local / 'dataset.png', dpi=80)


def _draw_lengths(axis: Axes, counts: CaptionCounts) -> None:
    for key, words in counts.words.items():
        cumulative = np.cumsum([words[n] for n in range(1, _LENGTHS)])
        last = max(int(np.searchsorted(cumulative, cumulative[-1] * 0.999)) + 2, 10)
        axis.plot(np.arange(1, last), [words[n] for n in range(1, last)], label=key)
    axis.set(xlabel='words per caption', ylabel='captions')
    axis.legend(fontsize=7, ncols=1 + len(counts.words) // 12)


def _draw_presence(axis: Axes, counts: CaptionCounts) -> None:
    keys = list(counts.words)
    present, absent = [counts.present(key) for key in keys], [counts.words[key][0] for key in keys]
    axis.barh(keys, present)
    axis.barh(keys, absent, left=present, color='lightgrey')
    axis.invert_yaxis()
    axis.tick_params('y', labelsize=7)
    axis.set(xlabel='samples with it\n(grey: without)')


def _draw_per_sample(axis: Axes, counts: CaptionCounts) -> None:
    numbers = sorted(counts.per_sample)
    axis.bar(numbers, [counts.per_sample[n] for n in numbers])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel='captions per sample', ylabel='samples', xlim=(numbers[0] - 1, numbers[-1] + 1))


def _draw_images(axis: Axes, samples: Sequence[Mapping[str, Any]], caption_keys: Sequence[str]) -> None:
    """In cells of one size, each under the beginning of its first caption.

    On one axis, since to lay out one for each would take longer than all the rest.
    """
    wall = Image.new('RGB', (_COLUMNS * _CELL, -(-len(samples) // _COLUMNS) * _CELL), 'white')
    for i, sample in enumerate(samples):
        image = ImageOps.contain(decode_image(sample[IMAGE], sample[SAMPLE_ID]), (_CELL - _TITLE, _CELL - _TITLE))
        row, column = divmod(i, _COLUMNS)
        top = (row + 1) * _CELL - image.height
        wall.paste(image, (column * _CELL + (_CELL - image.width) // 2, top))
        texts = (drawable(sample[caption_column(key)]) for key in caption_keys)
        first = next((text for text in texts if any(map(str.isalpha, text))), '')
        lines = textwrap.wrap(first, 40, max_lines=2, placeholder=' …')
        axis.text((column + 0.5) * _CELL, top - 5, '\n'.join(lines), ha='center', va='bottom', fontsize=7)
    axis.imshow(wall)
    axis.axis('off')


def _where_samples_went(card: Mapping[str, Any]) -> dict[str, int]:
    """What became of the samples that were read, and of the rows of tables elsewhere -> how many."""
    written = {f'written: {split}': n for split, n in card['samples'].items()}
    rows = {f'rows {name.replace("_", " ")}': n for name, n in card.get('tables', {}).items() if name in _ROW_COUNTS}
    return {**written, **card['dropped'], **card['filtered'], **rows}


def _draw_counts(axis: Axes, counts: Mapping[str, int]) -> None:
    bars = axis.barh([textwrap.fill(name, 36) for name in counts], list(counts.values()))
    axis.bar_label(bars, [f'{n:,}' for n in counts.values()], fontsize=7, padding=2)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.tick_params('y', labelsize=7)
    axis.set(xlabel='what became of the samples,\nand of the rows of tables')


def _spread(out: OutputFolder, split: str, n: int) -> list[dict[str, Any]]:
    """Up to `n` samples from all over a dataset, of a few of its shards."""
    shards = read_index(out.local / split)['shards']
    if shards[0]['compression'] or IMAGE not in read_columns(out.local / split):
        return []
    chosen = [shards[i] for i in np.unique(np.linspace(0, len(shards) - 1, _SHARDS).astype(int))]
    each = -(-n // len(chosen))
    samples = []
    for shard in chosen:
        name = f'{split}/{shard["raw_data"]["basename"]}'
        was_here = (out.local / name).is_file()
        out.fetch(name)
        reader = whole_shard(out.local / split, shard)
        samples += [reader[int(i)] for i in np.unique(np.linspace(0, len(reader) - 1, each).astype(int))]
        if not was_here:
            (out.local / name).unlink()
    return samples[:n]
