# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Report of a pipeline as one self-contained HTML page, rendered from the templates in `templates/`."""

import datetime
import io
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from llm2clip import __version__
from llm2clip.command import SECONDS_FILE, recorded_seconds, source_commit
from llm2clip.config import ReportConfig
from llm2clip.errors import ConfigError
from llm2clip.evaluation.scores import Results
from llm2clip.evaluation.tables import LABELS, Table, result_tables
from llm2clip.io.files import read_json, read_text, reading, write_text
from llm2clip.training.callbacks.jsonl_logger import METRICS_FILE, read_metrics

# `$` in names must not start a formula, and a fixed salt makes equal pictures byte-identical.
_style = matplotlib.rc_context({'text.parse_math': False, 'svg.hashsalt': 'llm2clip'})
# Paired differences of a model: label -> percentage points and their interval.
_Differences = dict[str, tuple[float, Sequence[float]]]
# `Table.topic` -> caption of the table.
_CAPTIONS = {
    'cra': 'How often the two captions of a pair find each other among {results.cra_pairs:,} pairs, which is '
           'what stage 1 teaches the LLM.',
    'retrieval': 'How often the right image is among the first 1, 5 or 10 that a text finds (text→image), '
                 'and the right text among the first that an image finds (image→text).',
    'accuracy': 'How often the right class of an image is the first, or among the first five; where images '
                'have any number of classes, how high each class has its images (mAP).',
    'averages': 'The mean of several sets, each of which counts the same.',
    'comparison': 'What each model has won (to the right) and lost (to the left) against '
                  '{results.comparison.baseline}, with the 95 % interval of the difference.',
}


class _Section(NamedTuple):
    """Section of the page: a table below its title, a caption and a picture."""

    table: Table
    caption: str
    picture: Markup = Markup('')


def write_report(config: ReportConfig) -> Path:
    """Write the report page of a pipeline and return its path.

    Raises:
        ConfigError: The folder of a step or a gallery is missing.
        FileError: A file of `evaluate` is missing or damaged.
    """
    results_file = Path(config.results, 'results.json')
    with reading(results_file, 'the results that `evaluate` writes'):
        results = Results.model_validate(read_json(results_file, dict))
    pictures = read_json(Path(config.results, 'gallery.json'), dict)
    galleries = {}
    for name in config.galleries:
        if name not in pictures:
            raise ConfigError(f'{config.results} has pictures of {[*pictures]}, not of {name}; `evaluate` '
                              'keeps those of retrieval benchmarks, unless its gallery is 0', key='galleries')
        galleries[name] = pictures[name]
    for step, folder in config.steps.items():
        if not Path(folder).is_dir():
            raise ConfigError(f'there is no folder {folder}', key=f'steps.{step}')
    path = Path(config.out, 'report.html')
    write_text(path, report_page(config.title, results, galleries, config.steps))
    return path


def report_page(
    title: str, results: Results, galleries: Mapping[str, Any], steps: Mapping[str, str] = {}
) -> str:
    """Return the HTML page: a summary, galleries, tables, trainings and configurations.

    Args:
        title: Title of the page.
        results: Results of an evaluation.
        galleries: Benchmark -> result of `make_gallery`, plus the name of the ``model``.
        steps: Step of the pipeline -> folder with its duration, metrics and configuration, if they exist.
    """
    sections = []
    for table in result_tables(results):
        caption = _CAPTIONS[table.topic].format(results=results)
        sections.append(_Section(table, caption, _picture(table, results)))
    seconds = {}
    configurations = {}
    for step, folder in steps.items():
        metrics = read_metrics(Path(folder, METRICS_FILE))
        if metrics:
            rows = []
            for name, values in metrics.items():
                if name.startswith(('loss/', 'metrics/')):
                    first, last = min(values), max(values)
                    start = f'{values[first]:.4g} (batch {first:,})' if first < last else ''
                    rows.append([_in_words(name), start, f'{values[last]:.4g} (batch {last:,})'])
            sections.append(_Section(
                Table(f'Training: {step}', ['', 'first', 'last'], rows),
                'Loss, evaluations and, with the callback lr_monitor, learning rates per batch.',
                curves(metrics)))
        seconds_file = Path(folder, SECONDS_FILE)
        if seconds_file.is_file():
            seconds[step] = recorded_seconds(seconds_file)
        config_file = Path(folder, 'config.yaml')
        if config_file.is_file():
            configurations[step] = read_text(config_file)
    summary = _summary(results)
    if seconds:
        seconds['all'] = sum(seconds.values())
        summary.append(f'All steps together took {seconds["all"] / 60:.1f} minutes.')
        rows = [[step, f'{value:.0f}'] for step, value in seconds.items()]
        sections.append(_Section(Table('Time', ['step', 'seconds'], rows),
                                 'Seconds per step, summed over all starts that were not killed.'))
    environment = jinja2.Environment(loader=jinja2.PackageLoader('llm2clip.evaluation'), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template('report.html.j2').render(
        title=title, version=__version__, commit=source_commit(), date=datetime.date.today().isoformat(),
        missing=results.missing, summary=summary, sections=sections, galleries=galleries,
        configurations=configurations)


def _summary(results: Results) -> list[str]:
    """Return a sentence per model on the first retrieval set, on the first zero-shot set and in each average,
    and one on all text encoders."""
    lines = []
    for name, benchmark in islice(results.retrieval.items(), 1):
        for model, scores in benchmark.models.items():
            lines.append(
                f'{model} on {name}: {scores.image_retrieval_recall_at_10:.1f} % of {scores.n_texts:,} texts '
                f'find their image among the first ten of {scores.n_images:,} ({scores.chance_at_10:.1f} % '
                f'in random order), and {scores.text_retrieval_recall_at_10:.1f} % of the images find a '
                'text of theirs.')
    for name, benchmark in islice(results.zeroshot.items(), 1):
        for model, scores in benchmark.models.items():
            if scores.zeroshot_top1 is not None:
                lines.append(f'{model} on {name}: {scores.zeroshot_top1:.1f} % of {scores.n_images:,} images '
                             f'get the right class out of {scores.n_classes:,} without training on them.')
    for name, average in results.averages.items():
        for model, scores in average.models.items():
            means = []
            for metric in ('mean', 'image_retrieval_recall@1', 'text_retrieval_recall@1'):
                if scores.value(metric) is not None:
                    means.append(f'{LABELS[metric]} {scores.value(metric):.1f} %')
            lines.append(f'{model} on {name}, {len(average.benchmarks)} sets: {", ".join(means)}.')
    if results.cra:
        encoders = '; '.join(f'{encoder}: {value:.1f} %' for encoder, value in results.cra.items())
        lines.append(f'How often the two captions of a pair find each other: {encoders}.')
    return lines


def _picture(table: Table, results: Results) -> Markup:
    """Picture above a table: bars of text encoders, differences from a baseline, or an empty one."""
    if table.topic == 'cra':
        return bars(results.cra)
    if results.comparison is None or table.topic != 'comparison':
        return Markup('')
    series: dict[str, _Differences] = {}
    for name, compared in results.comparison.select(table.kind).items():
        for model, changes in compared.models.items():
            for metric in compared.metrics:
                label = f'{name}, {LABELS[metric]}'
                value = changes.difference[metric]
                interval = changes.intervals.get(metric, (value, value))
                series.setdefault(model, {})[label] = value, interval
    return differences([*next(iter(series.values()))], series)


def _in_words(metric: str) -> str:
    """Return the name of a logged metric for readers, such as `retrieval recall@10`."""
    kind, _, rest = metric.partition('/')
    data, _, name = rest.partition('/')
    if kind == 'loss':
        return 'training loss' if name == 'total' else f'training loss, {name}'
    if kind == 'metrics':
        words = {'cra': 'caption retrieval accuracy'}.get(name, name.replace('_', ' '))
        return words if data == 'eval' else f'{words} on {data}'
    return re.sub(r'lr-\w+/group(\d+)', r'parameter group \1', metric)


def _svg(figure: Figure) -> Markup:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg', metadata={'Date': None}, transparent=True)
    document = buffer.getvalue()
    return Markup(document[document.index('<svg'):])


@_style
def bars(values: Mapping[str, float]) -> Markup:
    """Draw one horizontal bar per name, in percent, with the value behind."""
    figure = Figure(figsize=(5, 0.6 + 0.35 * len(values)))
    axis = figure.subplots()
    axis.bar_label(axis.barh(range(len(values)), list(values.values()), 0.7), fmt='%.1f', padding=3)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set_xlabel('%')
    axis.margins(x=0.12)
    axis.spines[['top', 'right']].set_visible(False)
    return _svg(figure)


@_style
def differences(labels: Sequence[str], series: Mapping[str, _Differences]) -> Markup:
    """Draw differences in percentage points with intervals as horizontal bars.

    Each label has a group of bars, one per series, from the top.  Every series has all labels in this order.
    """
    width = 0.8 / len(series)
    figure = Figure(figsize=(6, 1 + len(labels) * max(0.3, 0.18 * len(series))))
    axis = figure.subplots()
    for i, (name, values_by_label) in enumerate(series.items()):
        offset = (i - (len(series) - 1) / 2) * width
        values, intervals = map(np.array, zip(*values_by_label.values()))
        low, high = intervals.T
        axis.barh(np.arange(len(labels)) + offset, values, width, label=name, color=f'C{i}',
                  xerr=np.maximum(0, [values - low, high - values]), error_kw={'linewidth': 1})
    axis.axvline(0, color='black', linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel('points')
    axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right', 'left']].set_visible(False)
    axis.legend(fontsize=9, frameon=False)
    return _svg(figure)


@_style
def curves(metrics: Mapping[str, Mapping[int, float]]) -> Markup:
    """Plot loss, learning rates and evaluation metrics over batches, from the result of `read_metrics`: one
    picture each.  Metrics with fewer than three values have no curve."""
    pictures = []
    for title, prefix in (('loss', 'loss/train'), ('learning rate', 'lr-'), ('evaluation', 'metrics/')):
        names = [name for name in metrics if name.startswith(prefix) and len(metrics[name]) > 2]
        if not names:
            continue
        figure = Figure(figsize=(3.7, 3))
        axis = figure.subplots()
        for name in names:
            points = sorted(metrics[name].items())
            axis.plot(*zip(*points), label=_in_words(name), marker='.' if len(points) < 20 else None)
        axis.set(title=title, xlabel='batch')
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        pictures.append(_svg(figure))
    return Markup('\n').join(pictures)
