# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Charts as SVG, to stand in a page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

__all__ = ['CHANCE', 'bars', 'curves']

CHANCE = 'chance'
_LABELLED = 20


def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """A group of bars per label, one of each series, in percent; few groups have their values above the bars.

    Args:
        labels: Of the groups.
        series: Name -> a value for each group; `CHANCE` is grey.
    """
    many, width = len(labels) > 4, 0.8 / len(series)
    figure, axis = plt.subplots(figsize=(11 if many else 6, 3.2))
    for i, (name, values) in enumerate(series.items()):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(labels))]
        drawn = axis.bar(places, values, width, label=name, color='#bbbbbb' if name == CHANCE else f'C{i}')
        if len(labels) <= _LABELLED:
            axis.bar_label(drawn, fmt='%.1f', fontsize=8 if many else 10)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel('%')
    axis.margins(y=0.12)
    axis.spines[['top', 'right']].set_visible(False)
    if len(series) > 1:
        axis.legend(fontsize=9, frameon=False)
    return _svg(figure)


def curves(metrics: Mapping[str, Mapping[int, float]]) -> str:
    """Loss, learning rates and evaluation over batches.

    Args:
        metrics: Name -> batch -> value, as `read_metrics` returns them.
    """
    panels = [('loss', [n for n in metrics if n.startswith('loss/train')]),
              ('learning rate', [n for n in metrics if n.startswith('lr-')]),
              ('evaluation', [n for n in metrics if n.startswith('metrics/')])]
    panels = [(label, names) for label, names in panels if names]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels):
        for name in names:
            points = sorted(metrics[name].items())
            axis.plot(*zip(*points), label=name, marker='.' if len(points) < 20 else None)
        axis.set(title=label, xlabel='batch')
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure: Any) -> str:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg')
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index('<svg'):]
