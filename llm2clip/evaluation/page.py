# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The parts of an HTML page that needs no other file, charts among them: the report's, and the one of what a search
found."""

import functools
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Optional, ParamSpec, Union

from matplotlib.figure import Figure

from llm2clip.config import ConfigError
from llm2clip.drawing import drawing
from llm2clip.evaluation.tables import Table
from llm2clip.files import write_text

__all__ = ['CHANCE', 'bars', 'chip', 'curves', 'differences', 'picture', 'scatter', 'section', 'table', 'write_page']

_P = ParamSpec('_P')
CHANCE = 'chance'
_LABELLED = 20

# Made for a window of 1280 pixels; what is wider, such as a table of long names, scrolls inside its own box.
_STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1.5rem; color: #222 }
h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; overflow-wrap: anywhere }
h2 + p { max-width: 50rem } .note { max-width: 50rem; color: #777; font-size: 13px } .wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
td, th { padding: .25rem .5rem; border-bottom: 1px solid #ddd; vertical-align: top }
td + td, th + th { text-align: right } th:first-child { text-align: left }
td small { display: block; color: #777; white-space: nowrap } tr.paper td { color: #777; font-style: italic }
.grid { display: grid; gap: .5rem } .row { display: flex; gap: .4rem; align-items: center }
.row b { width: 15rem; text-align: right; font-weight: 500; flex: none }
.row i { width: 9.5rem; color: #777; flex: none }
.row div { display: flex; gap: .4rem; flex-wrap: wrap } .row img { width: 64px; height: 64px }
img { border: 3px solid #eee; border-radius: 6px; object-fit: contain; flex: none } img.right { border-color: #2a2 }
.chip { border: 2px solid #eee; border-radius: 6px; padding: .1rem .5rem } .chip.right { border-color: #2a2 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem }
.tiles figure { margin: 0; min-width: 0 } .pair { grid-template-columns: 1fr 1fr; width: 30rem; margin-bottom: 1rem }
.row .pair { display: grid } .row .pair img { width: 100%; height: auto }
.tiles figcaption { font-size: 13px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.tiles img { width: 100%; aspect-ratio: 1; box-sizing: border-box }
svg { max-width: 100%; height: auto } details pre { background: #f6f6f6; padding: 1rem; overflow: auto }
'''


_GENERATOR = b'<meta name="generator" content="llm2clip">'


def write_page(path: Union[str, Path], title: str, parts: Iterable[str]) -> None:
    """Write a page of HTML parts, which is never seen half written; makes its folder.

    Raises:
        ConfigError: There is a file of that name, and it is no page that this function wrote.
    """
    text, path = html.escape(title), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and _GENERATOR not in path.open('rb').read(500):
        raise ConfigError(f'{path}: is there already and was not written by llm2clip, expected another name')
    write_text(path, f'<!doctype html><html lang="en"><meta charset="utf-8">{_GENERATOR.decode()}'
               '<meta name="viewport" content="width=device-width, initial-scale=1">'
               f'<title>{text}</title><style>{_STYLE}</style><body><h1>{text}</h1>{"".join(parts)}</body></html>\n')


def section(title: str, seen: str, body: str) -> str:
    """A heading, a sentence that says what one sees below, and HTML."""
    return f'<section><h2>{html.escape(title)}</h2><p>{html.escape(seen)}</p>{body}</section>'


def table(content: Table) -> str:
    """Header and rows, above the table's note; an interval in brackets stands below its value."""
    head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in content.header)
    body = ''.join(f'<tr{" class=paper" if row[0].endswith("(paper)") else ""}>' + ''.join(map(_cell, row)) + '</tr>'
                   for row in content.rows)
    note = f'<p class="note">{html.escape(content.note)}</p>' if content.note else ''
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{note}'


def _cell(text: str) -> str:
    value, bracket, interval = html.escape(text).partition(' [')
    return f'<td>{value}<small>[{interval}</small></td>' if bracket else f'<td>{value}</td>'


def picture(source: str, right: bool = False) -> str:
    """An image by its data URI, framed in green if it is right; raises a ValueError for anything else."""
    if not source.startswith('data:image/'):
        raise ValueError(f'{source[:60]!r}: expected a picture as a data URI')
    return f'<img class="{"right" if right else ""}" src="{html.escape(source)}" alt="">'


def chip(text: str, right: bool) -> str:
    """A text, framed in green if it is right."""
    return f'<span class="chip {"right" if right else ""}">{html.escape(text)}</span>'


def _svg(draw: Callable[_P, Figure]) -> Callable[_P, str]:
    """`draw`, with its figure as SVG: nothing if there is an error, which is printed."""
    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> str:
        svg = ''
        with drawing(f'a picture of the report ({draw.__name__})'):
            figure, buffer = draw(*args, **kwargs), io.StringIO()
            figure.tight_layout()
            figure.savefig(buffer, format='svg', metadata={'Date': None})
            svg = buffer.getvalue()[buffer.getvalue().index('<svg'):]
        return svg

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


@_svg
def scatter(labels: Sequence[str], lines: Mapping[str, Sequence[tuple[float, float, str]]]) -> Figure:
    """Points in a plane, in percent, those of a name joined by a line.

    Args:
        labels: Of the horizontal and the vertical axis.
        lines: Name -> horizontal and vertical value and label of each point, in order.
    """
    figure = Figure(figsize=(6, 4.5))
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], marker='o', markersize=4, label=name)
        for x, y, label in points:
            axis.annotate(label, (x, y), textcoords='offset points', xytext=(5, 5), fontsize=8)
    axis.set(xlabel=f'{labels[0]} [%]', ylabel=f'{labels[1]} [%]')
    axis.margins(0.1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
