# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of the results of an evaluation, for Markdown and HTML, beside the numbers that papers report."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Union

from llm2clip.evaluation.paper import (
    Reported,
    reported_accuracies,
    reported_average,
    reported_cra,
    reported_recalls,
)
from llm2clip.evaluation.scores import (
    AverageScores,
    Differences,
    Results,
    RetrievalScores,
    Scores,
)

# Metric -> its name in tables.
_RECALLS = {
    'image_retrieval_recall@1': 'text→image R@1', 'image_retrieval_recall@5': 'text→image R@5',
    'image_retrieval_recall@10': 'text→image R@10', 'text_retrieval_recall@1': 'image→text R@1',
    'text_retrieval_recall@5': 'image→text R@5', 'text_retrieval_recall@10': 'image→text R@10',
}
LABELS = _RECALLS | {
    'zeroshot_top1': 'top-1', 'linear_probe_top1': 'top-1', 'mean_per_class': 'mean per class',
    'mean_average_precision': 'mAP', 'mean': 'mean',
}
_HEADINGS = {'retrieval': 'Retrieval', 'zeroshot': 'Zero-shot classification', 'linear_probe': 'Linear probe'}
_RETRIEVAL_COLUMNS = [*_RECALLS.values(), 'mean rank t→i/i→t', 'chance@10']
_INTERVAL = re.compile(r'(?<=\d) \[[-+.\d]+, [-+.\d]+\]$')
_UNITS = 'recall in %, 95 % bootstrap intervals; ranks count from 1'


class Table(NamedTuple):
    """Heading, column names and rows of cells."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ''
    topic: str = ''
    """``cra``, ``retrieval``, ``accuracy``, ``averages`` or ``comparison``."""
    kind: str = ''
    """Of a comparison, the kind of its benchmarks, such as ``zeroshot``."""


def result_tables(results: Results) -> list[Table]:
    """Return all tables of an evaluation."""
    return [*_cra_tables(results), *_retrieval_tables(results), *_accuracy_tables(results, 'zeroshot'),
            *_accuracy_tables(results, 'linear_probe'), *_average_tables(results),
            *_comparison_tables(results)]


def markdown(results: Results) -> str:
    """Return all tables as Markdown, below a note if the evaluation is incomplete."""
    parts = []
    if results.missing:
        missing = ', '.join(results.missing)
        parts.append(f'**Partial: the evaluation did not come to its end. Missing: {missing}.**')
    for table in result_tables(results):
        lines = []
        for cells in (table.header, ['---'] * len(table.header), *table.rows):
            escaped = [cell.replace('|', '\\|') for cell in cells]
            lines.append(f'| {" | ".join(escaped)} |')
        parts += [f'## {table.title}', '\n'.join(lines), table.note]
    return '\n\n'.join(parts) + '\n'


def plain(results: Results) -> str:
    """Return all tables for a terminal: in aligned columns, without intervals and notes."""
    parts = []
    for table in result_tables(results):
        rows = []
        for cells in (table.header, *table.rows):
            rows.append([_INTERVAL.sub('', cell).replace('text→image', 't→i').replace('image→text', 'i→t')
                         for cell in cells])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [table.title]
        for first, *others in rows:
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
            lines.append(f'  {"  ".join(cells)}'.rstrip())
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def _cra_tables(results: Results) -> Iterator[Table]:
    """One row per text encoder, then those of the paper."""
    if not results.cra:
        return
    title = 'Caption retrieval accuracy'
    if results.cra_name:
        title += f': {results.cra_name}'
    reported = reported_cra(results.cra_name)
    rows = [[encoder, f'{value:.1f}'] for encoder, value in results.cra.items()]
    rows += _paper_rows(reported, ['CRA'])
    note = f'%, {results.cra_pairs:,} pairs'
    if results.cra_precision == 'amp_bf16':
        note += '; computed in bfloat16'
    yield Table(title, ['encoder', 'CRA'], rows, note + _source(reported), 'cra')


def _retrieval_tables(results: Results) -> Iterator[Table]:
    """One table per benchmark, with a row per model.  The benchmarks that only one model has and no paper
    reports share one table per model, with a row per benchmark."""
    sets_by_model: dict[str, dict[str, RetrievalScores]] = {}
    for name, benchmark in results.retrieval.items():
        models = benchmark.models
        first_model, first = next(iter(models.items()))
        reported = reported_recalls([benchmark.benchmark])
        if len(models) == 1 and not reported.rows:
            sets_by_model.setdefault(first_model, {})[name] = first
            continue
        rows = [[model, *_retrieval_cells(scores)] for model, scores in models.items()]
        rows += _paper_rows(reported, [*_RECALLS], empty=2)
        note = f'{first.n_images:,} images, {first.n_texts:,} texts; {_UNITS}{_source(reported)}'
        note += _remarks(models, {name: first})
        yield Table(f'Retrieval: {name}', ['model', *_RETRIEVAL_COLUMNS], rows, note, 'retrieval')
    for model, sets in sets_by_model.items():
        rows = []
        for name, scores in sets.items():
            rows.append([name, f'{scores.n_images:,}', f'{scores.n_texts:,}', *_retrieval_cells(scores)])
        header = ['set', 'images', 'texts', *_RETRIEVAL_COLUMNS]
        yield Table(f'Retrieval: {model}', header, rows, _UNITS + _remarks(sets, sets), 'retrieval')


def _retrieval_cells(scores: RetrievalScores) -> list[str]:
    """Cells of `_RETRIEVAL_COLUMNS`."""
    cells = [_cell(scores, metric) for metric in _RECALLS]
    cells.append(f'{scores.image_retrieval_mean_rank:.1f}/{scores.text_retrieval_mean_rank:.1f}')
    cells.append(f'{scores.chance_at_10:.2f}')
    return cells


def _accuracy_tables(results: Results, kind: str) -> Iterator[Table]:
    """One table per classification benchmark, with a row per model, then those of the paper."""
    metrics = [f'{kind}_top1', f'{kind}_top5', 'mean_per_class']
    for name, benchmark in results.benchmarks(kind).items():
        models = benchmark.models
        first = next(iter(models.values()))
        note = f'{first.n_images:,} images, {first.n_classes:,} classes'
        rows = []
        if first.mean_average_precision is not None:
            header = ['model', 'mAP']
            rows += [[model, _cell(scores, 'mean_average_precision')] for model, scores in models.items()]
            note += ', any number of them per image; mean average precision in %'
        else:
            header = ['model', 'top-1', 'top-5', 'mean per class', 'chance']
            for model, scores in models.items():
                cells = [_cell(scores, metric) for metric in metrics]
                rows.append([model, *cells, f'{100 / scores.n_classes:.2f}'])
            reported = reported_accuracies(kind, name)
            rows += _paper_rows(reported, metrics[:1], empty=3)
            note += f'; %, 95 % bootstrap intervals{_source(reported)}'
        yield Table(f'{_HEADINGS[kind]}: {name}', header, rows, note + _remarks(models), 'accuracy')


def _average_tables(results: Results) -> Iterator[Table]:
    """One table per average, with a row per model, then those of papers.  With a baseline, each mean has a
    second column for the difference from it."""
    for name, average in results.averages.items():
        metrics = ['mean']
        if next(iter(average.models.values())).mean is None:
            metrics = ['image_retrieval_recall@1', 'text_retrieval_recall@1']
        header = ['model', *(LABELS[metric] for metric in metrics)]
        if results.comparison is not None:
            header += [f'{LABELS[metric]} − {results.comparison.baseline}' for metric in metrics]
        empty = len(header) - 1 - len(metrics)
        rows = []
        for model, scores in average.models.items():
            differences = [''] * empty
            if scores.compared is not None:
                differences = [_cell(scores.compared, metric, '+.1f') for metric in metrics]
            rows.append([model, *(_cell(scores, metric) for metric in metrics), *differences])
        reported = reported_average([*average.benchmarks], results)
        rows += _paper_rows(reported, metrics, empty)
        sets = []
        for benchmark, used in average.benchmarks.items():
            set_name = benchmark.split('.', 1)[1]
            if metrics == ['mean']:  # accuracies may be averaged over sets with different metrics
                set_name += f' ({LABELS[used[0]]})'
            sets.append(set_name)
        note = (f'mean of {len(sets)} sets: {", ".join(sets)}; %, 95 % bootstrap intervals, for which images '
                f'are drawn within each set{_source(reported)}')
        yield Table(f'Average: {name}', header, rows, note, 'averages')


def _comparison_tables(results: Results) -> Iterator[Table]:
    """One table per kind: differences from the baseline, one row per benchmark, model and metric."""
    if results.comparison is None:
        return
    baseline = results.comparison.baseline
    header = ['set', 'number', 'model', f'of {baseline}', 'of the model', 'difference']
    note = ('%, 95 % bootstrap intervals of the difference, for which the same images are drawn for both '
            'models')
    for kind, heading in _HEADINGS.items():
        rows = []
        for name, compared in results.comparison.select(kind).items():
            models = results.benchmarks(kind)[name].models
            for model, differences in compared.models.items():
                for metric in compared.metrics:
                    rows.append([name, LABELS[metric], model, f'{models[baseline].value(metric):.1f}',
                                 f'{models[model].value(metric):.1f}', _cell(differences, metric, '+.1f')])
        if rows:
            yield Table(f'Beside {baseline}: {heading}', header, rows, note, 'comparison', kind)


def _cell(scores: Union[Scores, AverageScores, Differences], metric: str, form: str = '.1f') -> str:
    """`84.2 [82.9, 85.4]`, without an interval if its ends are equal, for example if all answers are right;
    empty if a model lacks the metric."""
    value = scores.value(metric)
    if value is None:
        return ''
    low, high = scores.intervals.get(metric, (0, 0))
    if not low < high:
        return format(value, form)
    return f'{value:{form}} [{low:{form}}, {high:{form}}]'


def _paper_rows(reported: Reported, metrics: Sequence[str], empty: int = 0) -> list[list[str]]:
    """One row per model of a paper: its `metrics`, empty if it reports none, and `empty` empty cells."""
    rows = []
    for model, values in reported.rows.items():
        row = [f'{model} (paper)']
        for metric in metrics:
            row.append(f'{values[metric]:.1f}' if metric in values else '')
        rows.append(row + [''] * empty)
    return rows


def _source(reported: Reported) -> str:
    """Remark on the source of a paper's numbers; empty if there are none."""
    return f'; paper: {reported.source}' if reported.rows else ''


def _remarks(scores: Mapping[str, Scores], sets: Mapping[str, RetrievalScores] = {}) -> str:
    """Remarks on truncated texts and bfloat16, for the models of a set or the sets of a model, and on images
    left out of `sets`."""
    truncated: list[str] = []
    in_bfloat16: list[str] = []
    for name, entry in scores.items():
        if entry.n_truncated:
            truncated.append(f'{name} {entry.n_truncated:,}')
        if entry.precision == 'amp_bf16':
            in_bfloat16.append(name)
    without_caption: list[str] = []
    for name, entry in sets.items():
        if entry.n_without_caption:
            without_caption.append(f'{name} {entry.n_without_caption:,}')
    remarks = ''
    if truncated:
        remarks += f'; texts that were too long and lost their end: {", ".join(truncated)}'
    if without_caption:
        remarks += f'; images left out since they have no caption of the set: {", ".join(without_caption)}'
    if in_bfloat16:
        remarks += f'; computed in bfloat16: {", ".join(in_bfloat16)}'
    return remarks
