# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The card of a dataset: numbers in JSON, and a picture of what is in it."""

import json
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from streaming.base.format import reader_from_json

from llm2clip.data.images import decode_image
from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column, read_columns, read_index
from llm2clip.folders import OutputFolder

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

__all__ = ['LENGTH_BINS', 'write_card']

# Captions of this many words or more count together.
LENGTH_BINS = 257
_ROWS, _COLUMNS, _SHARDS = 4, 6, 8


def write_card(
    out: OutputFolder, card: Mapping[str, Any], words: Mapping[str, Mapping[str, np.ndarray]], name: str
) -> None:
    """Write `dataset.png`, then the card's JSON, which says that the dataset is complete.

    Args:
        out: Folder of the splits.
        card: What the JSON holds, less the captions' lengths.
        words: Split -> caption key -> how many captions have 0, 1, 2, … words.
        name: Of the JSON file.
    """
    captions = {split: {key: _summary(counts) for key, counts in keys.items()} for split, keys in words.items()}
    _picture(out, words)
    out.publish('dataset.png')
    out.commit(name, json.dumps({**card, 'captions': captions}, indent=2, ensure_ascii=False) + '\n')


def _summary(counts: np.ndarray) -> dict[str, float]:
    """Number of captions and quantiles of their words."""
    cumulative = counts.cumsum()
    quantile = {f'words_p{q}': int(np.searchsorted(cumulative, cumulative[-1] * q / 100)) for q in (5, 50, 95)}
    return {'captions': int(cumulative[-1]), **quantile}


def _picture(out: OutputFolder, words: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    split = next(iter(words))
    images = [sample for sample in _spread(out, split, _ROWS * _COLUMNS) if IMAGE in sample]
    figure = plt.figure(figsize=(14, 13 if images else 5), layout='constrained')
    grid = figure.add_gridspec(_ROWS + 1 if images else 1, _COLUMNS)
    axis = figure.add_subplot(grid[0, :])
    for key, counts in words[split].items():
        last = max(int(np.searchsorted(counts.cumsum(), counts.sum() * 0.999)) + 2, 10)
        axis.plot(np.arange(last), counts[:last], label=key)
    axis.set(xlabel='words a caption', ylabel='captions', title=f'{out.local.name}, {split}')
    axis.legend(fontsize=8, ncols=2)
    for i, sample in enumerate(images):
        axis = figure.add_subplot(grid[1 + i // _COLUMNS, i % _COLUMNS])
        axis.imshow(decode_image(sample[IMAGE], sample[SAMPLE_ID]))
        axis.set_title(sample[caption_column(next(iter(words[split])))][:40], fontsize=7)
        axis.axis('off')
    figure.savefig(out.local / 'dataset.png', dpi=80)
    plt.close(figure)


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
        reader = reader_from_json(str(out.local), split, shard)
        samples += [reader[int(i)] for i in np.unique(np.linspace(0, len(reader) - 1, each).astype(int))]
        if not was_here:
            (out.local / name).unlink()
    return samples[:n]
