# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Everything that a pipeline wrote, as one self-contained HTML file."""

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

from llm2clip.callbacks.jsonl_logger import read_metrics  # noqa: E402
from llm2clip.runs import SECONDS_FILE  # noqa: E402

__all__ = ['collect_seconds', 'render_report']

_STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } .grid { display: grid; gap: .5rem } .row { display: flex; gap: .4rem;
align-items: center } .row b { width: 15rem; text-align: right; font-weight: 500 }
.row img { width: 64px; height: 64px; border: 3px solid #eee; border-radius: 6px } .row img.right { border-color: #2a2 }
.chip { border: 2px solid #eee; border-radius: 6px; padding: .1rem .5rem } .chip.right { border-color: #2a2 }
svg { max-width: 100%; height: auto } details pre { background: #f6f6f6; padding: 1rem; overflow: auto }
'''


def collect_seconds(steps: Mapping[str, str]) -> dict[str, float]:
    """Step -> seconds that its folder has recorded."""
    seconds = {}
    for step, folder in steps.items():
        path = Path(folder, SECONDS_FILE)
        if path.is_file():
            seconds[step] = json.loads(path.read_text())['seconds']
    return seconds


def render_report(title: str, results: Mapping[str, Any], gallery: Mapping[str, Any], steps: Mapping[str, str]) -> str:
    """The page.

    Args:
        title: Heading.
        results: `results.json`.
        gallery: What `llm2clip.evaluate.read_gallery` returned.
        steps: Step -> folder, where configurations and metrics are looked for.
    """
    curves = ''.join(f'<h2>Curves: {html.escape(step)}</h2>{_curves(metrics)}' for step, folder in steps.items()
                     if (metrics := read_metrics(Path(folder, 'metrics.jsonl'))))
    configs = ''.join(
        f'<details><summary>{html.escape(step)}</summary><pre>{html.escape(path.read_text())}</pre></details>'
        for step, folder in steps.items() if (path := Path(folder, 'config.yaml')).is_file())
    parts = [
        f'<h1>{html.escape(title)}</h1>', '<h2>Steps</h2>', _seconds_table(results.get('seconds', {})),
        '<h2>Stage 1: caption retrieval accuracy, %</h2>', _dict_table(results.get('stage1', {})),
        '<h2>Stage 2: retrieval, %</h2>', _retrieval_table(results.get('stage2', {})), curves,
        '<h2>Captions as queries</h2><p>The best images, right ones framed in green.</p>',
        _caption_grid(gallery['captions']),
        '<h2>Images as queries</h2><p>The best captions, right ones framed in green.</p>',
        _image_grid(gallery['images']), '<h2>Configurations</h2>', configs,
    ]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<style>{_STYLE}</style><body>{"".join(parts)}</body></html>\n')


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in header)
    body = ''.join('<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<table><tr>{head}</tr>{body}</table>'


def _seconds_table(seconds: Mapping[str, float]) -> str:
    rows = [[step, f'{value:.0f}'] for step, value in seconds.items()]
    return _table(['step', 'seconds'], [*rows, ['all', f'{sum(seconds.values()):.0f}']])


def _dict_table(values: Mapping[str, float]) -> str:
    return _table(['encoder', 'CRA'], [[name, f'{value:.1f}'] for name, value in values.items()])


def _retrieval_table(sets: Mapping[str, Mapping[str, float]]) -> str:
    names = [f'{way}_retrieval_recall@{k}' for way in ('image', 'text') for k in (1, 5, 10)]
    header = ['set', 'images', 'texts', *(f'{way} R@{k}' for way in ('text→image', 'image→text') for k in (1, 5, 10)),
              'chance@10']
    rows = [[name, str(int(values['n_images'])), str(int(values['n_texts'])),
             *(f'{values[key]:.1f}' for key in names), f'{values["chance@10"]:.2f}'] for name, values in sets.items()]
    return _table(header, rows)


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


def _picture(data: bytes, right: bool = False) -> str:
    kind = 'jpeg' if data.startswith(b'\xff\xd8') else 'png'
    source = f'data:image/{kind};base64,{base64.b64encode(data).decode()}'
    return f'<img class="{"right" if right else ""}" src="{source}" alt="">'


def _caption_grid(rows: list[dict[str, Any]]) -> str:
    return '<div class="grid">' + ''.join(
        f'<div class="row"><b>{html.escape(row["query"])}</b>'
        + ''.join(_picture(image, right) for image, right in row['results']) + '</div>' for row in rows) + '</div>'


def _image_grid(rows: list[dict[str, Any]]) -> str:
    return '<div class="grid">' + ''.join(
        f'<div class="row">{_picture(row["query"])}' + ''.join(
            f'<span class="chip {"right" if right else ""}">{html.escape(text)}</span>'
            for text, right in row['results']) + '</div>' for row in rows) + '</div>'
