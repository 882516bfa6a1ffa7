# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Everything that a pipeline wrote, as one self-contained HTML file."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

from llm2clip.command import SECONDS_FILE  # noqa: E402
from llm2clip.config import ConfigError  # noqa: E402
from llm2clip.evaluation.tables import Table, partial_note, result_tables  # noqa: E402
from llm2clip.training.callbacks.jsonl_logger import read_metrics  # noqa: E402

__all__ = ['check_steps', 'collect_seconds', 'read_evaluation', 'render_report']

_STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } .grid { display: grid; gap: .5rem } .row { display: flex; gap: .4rem;
align-items: center } .row b { width: 15rem; text-align: right; font-weight: 500; flex: none }
.row img { width: 64px; height: 64px; border: 3px solid #eee; border-radius: 6px } .row img.right { border-color: #2a2 }
.row i { width: 8rem; color: #777; font-size: 13px; flex: none }
.chip { border: 2px solid #eee; border-radius: 6px; padding: .1rem .5rem } .chip.right { border-color: #2a2 }
tr.paper td { color: #777; font-style: italic }
svg { max-width: 100%; height: auto } details pre { background: #f6f6f6; padding: 1rem; overflow: auto }
'''


def read_evaluation(folder: Union[str, Path], galleries: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `evaluate` wrote.

    Args:
        folder: Where to.
        galleries: Which retrieval benchmarks' pictures are wanted.

    Returns:
        `results.json`, and the wanted part of `gallery.json`.

    Raises:
        ConfigError: There is no such folder, file or gallery; says what there is.
    """
    found = []
    for name in ('results.json', 'gallery.json'):
        try:
            found.append(json.loads(Path(folder, name).read_text()))
        except (OSError, ValueError) as error:
            reason = 'there is no such folder' if not Path(folder).is_dir() else f'{name}: {error}'
            raise ConfigError(f'results: expected the folder of an evaluation, with results.json and gallery.json; got '
                              f'{folder} ({reason})') from None
    results, pictures = found
    for name in galleries:
        if name not in pictures:
            raise ConfigError(f'galleries: {folder} has pictures of {", ".join(pictures) or "nothing"}, not of {name}; '
                              '`evaluate` keeps those of retrieval benchmarks, unless its gallery is 0')
    return results, {name: pictures[name] for name in galleries}


def check_steps(steps: Mapping[str, str]) -> None:
    """Raise a ConfigError unless every step's folder is there."""
    for step, folder in steps.items():
        if not Path(folder).is_dir():
            raise ConfigError(f'steps.{step}: there is no folder {folder}')


def collect_seconds(steps: Mapping[str, str]) -> dict[str, float]:
    """Step -> seconds that its folder has recorded."""
    seconds = {}
    for step, folder in steps.items():
        path = Path(folder, SECONDS_FILE)
        if path.is_file():
            seconds[step] = json.loads(path.read_text())['seconds']
    return seconds


def render_report(
    title: str, results: Mapping[str, Any], galleries: Mapping[str, Any], steps: Optional[Mapping[str, str]] = None
) -> str:
    """The page.

    Args:
        title: Heading.
        results: `results.json`.
        galleries: Benchmark -> what `llm2clip.evaluation.gallery.make_gallery` returned, with the ``model``'s name.
        steps: Step of a pipeline -> folder, where seconds, metrics and configurations are looked for.
    """
    steps = steps or {}
    curves = ''.join(f'<h2>Curves: {html.escape(step)}</h2>{_curves(metrics)}' for step, folder in steps.items()
                     if (metrics := read_metrics(Path(folder, 'metrics.jsonl'))))
    configs = ''.join(
        f'<details><summary>{html.escape(step)}</summary><pre>{html.escape(path.read_text())}</pre></details>'
        for step, folder in steps.items() if (path := Path(folder, 'config.yaml')).is_file())
    seconds, note = collect_seconds(steps), partial_note(results)
    parts = [f'<h1>{html.escape(title)}</h1>', f'<p><b>{html.escape(note)}</b></p>' if note else '',
             _seconds_table(seconds) if seconds else '',
             *map(_table, result_tables(results)), curves, *(_gallery(name, g) for name, g in galleries.items()),
             '<h2>Configurations</h2>' if configs else '', configs]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<style>{_STYLE}</style><body>{"".join(parts)}</body></html>\n')


def _table(table: Table) -> str:
    head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in table.header)
    body = ''.join(f'<tr{" class=paper" if row[0].endswith("(paper)") else ""}>'
                   + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in table.rows)
    note = f'<p>{html.escape(table.note)}</p>' if table.note else ''
    return f'<h2>{html.escape(table.title)}</h2>{note}<table><tr>{head}</tr>{body}</table>'


def _seconds_table(seconds: Mapping[str, float]) -> str:
    rows = [[step, f'{value:.0f}'] for step, value in seconds.items()]
    return _table(Table('Steps', ['step', 'seconds'], [*rows, ['all', f'{sum(seconds.values()):.0f}']]))


def _curves(metrics: Mapping[str, Mapping[int, float]]) -> str:
    """Loss, evaluation and learning rates over batches, as SVG."""
    panels = [('loss', [n for n in metrics if n.startswith('loss/train')]),
              ('learning rate', [n for n in metrics if n.startswith('lr-')]),
              ('evaluation', [n for n in metrics if n.startswith('metrics/')])]
    panels = [(label, names) for label, names in panels if names]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels):
        for name in names:
            points = sorted(metrics[name].items())
            axis.plot(*zip(*points), label=name, marker='.' if len(points) < 20 else None)
        axis.set(title=label, xlabel='batch')
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg')
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index('<svg'):]


def _picture(source: str, right: bool = False) -> str:
    return f'<img class="{"right" if right else ""}" src="{source}" alt="">'


def _chip(text: str, right: bool) -> str:
    return f'<span class="chip {"right" if right else ""}">{html.escape(text)}</span>'


def _gallery(name: str, gallery: Mapping[str, Any]) -> str:
    """Best, median and worst queries of both directions, right results framed in green."""
    parts = [f'<h2>{html.escape(name)}, by {html.escape(gallery["model"])}</h2>']
    for title, rows, query, result in (
            ('Texts as queries', gallery['texts'], lambda text: f'<b>{html.escape(text)}</b>', _picture),
            ('Images as queries', gallery['images'], _picture, _chip)):
        parts.append(f'<h3>{title}: best, median and worst; right ones framed in green</h3><div class="grid">')
        for row in rows:
            found = ''.join(result(item, right) for item, right in row['results'])
            parts.append(f'<div class="row {row["kind"]}"><i>{row["kind"]}, rank {row["rank"]:,}</i>'
                         f'{query(row["query"])}{found}</div>')
        parts.append('</div>')
    return ''.join(parts)
