# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""HTML pages that need no other file, by the templates in `templates/`, and their charts as SVG."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, ParamSpec, Union

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from llm2clip.config import ConfigError
from llm2clip.data.convert.card import drawing
from llm2clip.files import write_text

__all__ = ['CHANCE', 'bars', 'curves', 'differences', 'render', 'write_page']

_P = ParamSpec('_P')
CHANCE = 'chance'
_LABELLED = 20
_GENERATOR = b'<meta name="generator" content="llm2clip">'


def render(template: str, **content: Any) -> str:
    """The HTML of a template in `templates/`; all texts in `content` that are no `Markup` are escaped.

    Raises:
        jinja2.UndefinedError: The template needs more.
        ValueError: A picture is no data URI.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader('llm2clip.evaluation'), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters['data_image'] = _data_image
    return environment.get_template(template).render(content)


def _data_image(source: str) -> str:
    if not source.startswith('data:image/'):
        raise ValueError(f'{source[:60]!r}: expected a picture as a data URI')
    return source


def write_page(path: Union[str, Path], page: str) -> None:
    """Write a page that `render` made, which is never seen half written; makes its folder.

    Raises:
        ConfigError: There is a file of that name, and it is no page that this function wrote.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and _GENERATOR not in path.open('rb').read(500):
        raise ConfigError(f'{path}: is there already and was not written by llm2clip, expected another name')
    write_text(path, page)


def _svg(draw: Callable[_P, Figure]) -> Callable[_P, Markup]:
    """`draw`, with its figure as SVG: nothing if there is an error, which is printed."""
    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Markup:
        svg = ''
        with drawing(f'a picture of the report ({draw.__name__})'):
            figure, buffer = draw(*args, **kwargs), io.StringIO()
            figure.tight_layout()
            figure.savefig(buffer, format='svg', metadata={'Date': None})
            svg = buffer.getvalue()[buffer.getvalue().index('<svg'):]
        return Markup(svg)

    return drawn


@_svg
def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> Figure:
    """A group of bars per label, one of each series, in percent; few groups have their values above the bars.

    Args:
        labels: Of the groups.
        series: Name -> a value for each group; `CHANCE` is grey.
    """
    many, width = len(labels) > 4, 0.8 / len(series)
    figure = Figure(figsize=(11 if many else 6, 3.2))
    axis = figure.subplots()
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
    return figure


@_svg
def differences(
    labels: Sequence[str], series: Mapping[str, Mapping[str, tuple[float, Optional[Sequence[float]]]]]
) -> Figure:
    """A group of lying bars per label, one of each series, from 0 to a difference in points, with its interval.

    Args:
        labels: Of the groups, from the top.
        series: Name -> label -> the difference, and low and high if they are known; a series may lack some.
    """
    width = 0.8 / len(series)
    figure = Figure(figsize=(11, 1 + len(labels) * max(0.3, 0.18 * len(series))))
    axis = figure.subplots()
    for i, (name, found) in enumerate(series.items()):
        places = [labels.index(label) + (i - (len(series) - 1) / 2) * width for label in found]
        values = [value for value, _ in found.values()]
        ends = [interval or (value, value) for value, interval in found.values()]
        sides = [[max(0.0, sign * (value - pair[end])) for value, pair in zip(values, ends)]
                 for end, sign in ((0, 1), (1, -1))]
        axis.barh(places, values, width, xerr=sides, label=name, color=f'C{i}', error_kw={'linewidth': 1})
    axis.axvline(0, color='black', linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel('points')
    axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right', 'left']].set_visible(False)
    axis.legend(fontsize=9, frameon=False)
    return figure


@_svg
def curves(metrics: Mapping[str, Mapping[int, float]]) -> Figure:
    """Loss, learning rates and evaluation over batches.

    Args:
        metrics: Name -> batch -> value, as `read_metrics` returns them.
    """
    panels = [('loss', [n for n in metrics if n.startswith('loss/train')]),
              ('learning rate', [n for n in metrics if n.startswith('lr-')]),
              ('evaluation', [n for n in metrics if n.startswith('metrics/')])]
    panels = [(label, names) for label, names in panels if names]
    figure = Figure(figsize=(3.7 * len(panels), 3))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels):
        for name in names:
            points = sorted(metrics[name].items())
            axis.plot(*zip(*points), label=name, marker='.' if len(points) < 20 else None)
        axis.set(title=label, xlabel='batch')
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure
