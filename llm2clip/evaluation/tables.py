# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of `results.json` for Markdown and HTML, with the numbers that papers report (`paper.yaml`)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import yaml

_MEASURES = {
    'mean': 'mean', 'image_retrieval_recall@1': 'text→image R@1', 'text_retrieval_recall@1': 'image→text R@1',
    'zeroshot_top1': 'top-1', 'linear_probe_top1': 'top-1', 'mean_per_class': 'mean per class',
    'mean_average_precision': 'mAP',
}
_KINDS = {'retrieval': 'Retrieval', 'zeroshot': 'Zero-shot classification', 'linear_probe': 'Linear probe'}
_RETRIEVAL = {
    'image_retrieval_recall@1': 'text→image R@1', 'image_retrieval_recall@5': 'text→image R@5',
    'image_retrieval_recall@10': 'text→image R@10', 'text_retrieval_recall@1': 'image→text R@1',
    'text_retrieval_recall@5': 'image→text R@5', 'text_retrieval_recall@10': 'image→text R@10',
}
_UNITS = 'recall in %, 95 % bootstrap intervals; ranks count from 1'


def measure(metric: str) -> str:
    """Return the name of a metric in tables."""
    return _MEASURES.get(metric, metric.replace('_', ' '))


class Table(NamedTuple):
    """Heading, column names and rows of cells."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ''
    topic: str = ''
    """``retrieval``, ``accuracy``, ``averages`` or ``cra``; for a comparison with a baseline,
    ``comparison.`` and the kind of the benchmarks, such as ``comparison.zeroshot``."""


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return all tables of a `results.json`."""
    return [*_cra_tables(results), *_retrieval_tables(results), *_accuracy_tables(results),
            *_average_tables(results), *_comparison_tables(results)]


def markdown(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown, below a note if the evaluation is incomplete."""
    parts = []
    if results.get('missing'):
        missing = ', '.join(results['missing'])
        parts.append(f'**Partial: the evaluation did not come to its end. Missing: {missing}.**')
    for table in result_tables(results):
        lines = []
        for cells in (table.header, ['---'] * len(table.header), *table.rows):
            escaped = [cell.replace('|', '\\|') for cell in cells]
            lines.append(f'| {" | ".join(escaped)} |')
        part = f'## {table.title}\n\n' + '\n'.join(lines)
        if table.note:
            part += f'\n\n{table.note}'
        parts.append(part)
    return '\n\n'.join(parts) + '\n'


def _with_interval(value: float, interval: Optional[Sequence[float]], form: str) -> str:
    """`84.2 [82.9, 85.4]`; no interval if its ends are equal, for example if all answers are right."""
    text = format(value, form)
    if interval:
        low, high = interval
        if low < high:
            text += f' [{low:{form}}, {high:{form}}]'
    return text


def _cell(values: Mapping[str, Any], metric: str) -> str:
    """Metric with its interval; empty if a model lacks it."""
    if metric not in values:
        return ''
    return _with_interval(values[metric], values.get('intervals', {}).get(metric), '.1f')


def _difference(compared: Mapping[str, Any], metric: str) -> str:
    """`-1.2 [-2.5, +0.1]`"""
    return _with_interval(compared['difference'][metric], compared['intervals'].get(metric), '+.1f')


def _remark(text: str, values: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """`; text: name 1,234, …` with the count at `key` of each name; empty if there are none."""
    counts = [f'{name} {value[key]:,}' for name, value in values.items() if value.get(key)]
    return f'; {text}: {", ".join(counts)}' if counts else ''


def _remarks(values: Mapping[str, Mapping[str, Any]], sets: Mapping[str, Mapping[str, Any]] = {}) -> str:
    """Remarks on truncated texts and bfloat16, for the models of a set or the sets of a model, and on images
    left out of `sets`."""
    remarks = _remark('texts that were too long and lost their end', values, 'n_truncated')
    remarks += _remark('images left out since they have no caption of the set', sets, 'n_without_caption')
    narrow = [name for name, value in values.items() if value.get('precision') == 'amp_bf16']
    if narrow:
        remarks += f'; computed in bfloat16: {", ".join(narrow)}'
    return remarks


_LLM2CLIP = 'arXiv 2411.04997 v6'
_PROCLIP = 'arXiv 2510.18795'
_PAPER = yaml.safe_load(Path(__file__).with_name('paper.yaml').read_text('utf-8'))
# Table of the LLM2CLIP paper -> key in `paper.yaml`, and the benchmarks of its columns.
_COLUMNS = {'1': ('five_sets', ('flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci')),
            '2': ('chinese', ('flickr_cn', 'coco_cn'))}


class Reported(NamedTuple):
    """Numbers that a paper reports for a benchmark or an average."""

    rows: Mapping[str, Mapping[str, float]]
    """Model -> metric -> percent; empty if the paper reports none."""
    source: str = ''
    """Paper and table."""


def _recalls(cell: str) -> dict[str, float]:
    """Recall@1 of both directions, from a cell `image→text/text→image`."""
    image_to_text, text_to_image = cell.split('/')
    return {'text_retrieval_recall@1': float(image_to_text), 'image_retrieval_recall@1': float(text_to_image)}


def reported_recalls(benchmark: str) -> Reported:
    """Return reported recall@1 of both directions on a set, by the name of its source, such as `coco`."""
    for table, (key, columns) in _COLUMNS.items():
        if benchmark in columns:
            column = columns.index(benchmark)
            rows = {model: _recalls(cells.split()[column]) for model, cells in _PAPER[key].items()}
            return Reported(rows, f'{_LLM2CLIP}, table {table}')
    return Reported({})


def reported_average(benchmarks: Sequence[str], results: Mapping[str, Any]) -> Reported:
    """Return reported means over benchmarks of one kind, named as in `results`, such as `zeroshot.food101`.
    The metric is `mean` for accuracies and recall@1 of each direction for retrieval."""
    kind = benchmarks[0].partition('.')[0]
    names = [benchmark.partition('.')[2] for benchmark in benchmarks]
    proclip = _PAPER['proclip']
    if kind == 'zeroshot' and sorted(names) == sorted(proclip['sets']):
        rows = {model: {'mean': mean} for model, mean in proclip['means'].items()}
        return Reported(rows, f'{_PROCLIP}, table 2')
    if kind != 'retrieval':
        return Reported({})
    sets = [results[kind][name]['benchmark'] for name in names]
    if sets == ['xm3600'] * 36:
        rows = {model: _recalls(cell) for model, cell in _PAPER['xm3600'].items()}
        return Reported(rows, f'{_LLM2CLIP}, table 2')
    for table, (_, columns) in _COLUMNS.items():
        if set(sets) <= set(columns):
            per_set = [reported_recalls(name).rows for name in sets]
            means = {}
            for model, metrics in per_set[0].items():
                means[model] = {metric: sum(recalls[model][metric] for recalls in per_set) / len(sets)
                                for metric in metrics}
            return Reported(means, f'{_LLM2CLIP}, table {table}')
    return Reported({})


def _paper_rows(reported: Reported, metrics: Sequence[str], empty: int = 0) -> list[list[str]]:
    """One row per model of a paper, with its numbers for `metrics` and `empty` empty cells."""
    rows = []
    for model, values in reported.rows.items():
        cells = [_cell(values, metric) for metric in metrics]
        rows.append([f'{model} (paper)', *cells, *[''] * empty])
    return rows


def _source(reported: Reported) -> str:
    """Remark on the source of a paper's numbers; empty if there are none."""
    return f'; paper: {reported.source}' if reported.rows else ''


def _cra_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Table of caption retrieval accuracy, if text encoders were evaluated."""
    if not results.get('cra'):
        return
    title = 'Caption retrieval accuracy'
    note = '%'
    reported = Reported({})
    name = results.get('cra_name')
    if name:
        title += f': {name}'
    if name == 'coco':
        numbers = {model: {'CRA': value} for model, value in _PAPER['cra'].items()}
        reported = Reported(numbers, f'{_LLM2CLIP}, table A1')
    if 'cra_pairs' in results:
        note += f', {results["cra_pairs"]:,} pairs'
    if results.get('cra_precision') == 'amp_bf16':
        note += '; computed in bfloat16'
    rows = [[encoder, f'{value:.1f}'] for encoder, value in results['cra'].items()]
    rows += _paper_rows(reported, ['CRA'])
    yield Table(title, ['encoder', 'CRA'], rows, note + _source(reported), 'cra')


def _retrieval_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per benchmark; benchmarks with one model and no paper's numbers share one table per model."""
    header = [*_RETRIEVAL.values(), 'mean rank t→i/i→t', 'chance@10']
    by_model: dict[str, dict[str, Any]] = {}
    for name, entry in results.get('retrieval', {}).items():
        models = entry['models']
        reported = reported_recalls(entry['benchmark'])
        first_model, first = next(iter(models.items()))
        if len(models) == 1 and not reported.rows:
            by_model.setdefault(first_model, {})[name] = first
            continue
        rows = [[model, *_retrieval_cells(values)] for model, values in models.items()]
        rows += _paper_rows(reported, [*_RETRIEVAL], empty=2)
        note = f'{first["n_images"]:,} images, {first["n_texts"]:,} texts; {_UNITS}'
        note += _source(reported) + _remarks(models, {name: first})
        yield Table(f'Retrieval: {name}', ['model', *header], rows, note, 'retrieval')
    for model, sets in by_model.items():
        rows = [[name, f'{values["n_images"]:,}', f'{values["n_texts"]:,}', *_retrieval_cells(values)]
                for name, values in sets.items()]
        yield Table(f'Retrieval: {model}', ['set', 'images', 'texts', *header], rows,
                    _UNITS + _remarks(sets, sets), 'retrieval')


def _retrieval_cells(values: Mapping[str, Any]) -> list[str]:
    cells = [_cell(values, metric) for metric in _RETRIEVAL]
    mean_ranks = f'{values["image_retrieval_mean_rank"]:.1f}/{values["text_retrieval_mean_rank"]:.1f}'
    return [*cells, mean_ranks, f'{values["chance@10"]:.2f}']


def _accuracy_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per classification benchmark."""
    for kind in ('zeroshot', 'linear_probe'):
        for name, entry in results.get(kind, {}).items():
            yield _accuracy_table(kind, name, entry['models'])


def _accuracy_table(kind: str, name: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    title = f'{_KINDS[kind]}: {name}'
    first = next(iter(models.values()))
    counts = f'{first["n_images"]:,} images, {first["n_classes"]:,} classes'
    if 'mean_average_precision' in first:
        rows = [[model, _cell(values, 'mean_average_precision')] for model, values in models.items()]
        note = f'{counts}, any number of them per image; mean average precision in %{_remarks(models)}'
        return Table(title, ['model', 'mAP'], rows, note, 'accuracy')
    top1 = f'{kind}_top1'
    paper = _PAPER['accuracy'].get(f'{kind}.{name}', {})
    reported = Reported({model: {top1: value} for model, value in paper.items()}, f'{_LLM2CLIP}, table 3')
    rows = [[model, _cell(values, top1), _cell(values, f'{kind}_top5'), f'{values["mean_per_class"]:.1f}',
             f'{100 / values["n_classes"]:.2f}'] for model, values in models.items()]
    rows += _paper_rows(reported, [top1], empty=3)
    note = f'{counts}; %, 95 % bootstrap intervals{_source(reported)}{_remarks(models)}'
    return Table(title, ['model', 'top-1', 'top-5', 'mean per class', 'chance'], rows, note, 'accuracy')


def _average_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per average: one row per model, then the models of papers."""
    for name, average in results.get('averages', {}).items():
        models = average['models']
        benchmarks = average['benchmarks']
        first = next(iter(models.values()))
        metrics = [metric for metric in _MEASURES if metric in first]
        header = ['model', *map(measure, metrics)]
        if 'comparison' in results:
            baseline = results['comparison']['baseline']
            header += [f'{measure(metric)} − {baseline}' for metric in metrics]
        empty = len(header) - 1 - len(metrics)
        rows = []
        for model, values in models.items():
            differences = [''] * empty
            if 'compared' in values:
                differences = [_difference(values['compared'], metric) for metric in metrics]
            rows.append([model, *(_cell(values, metric) for metric in metrics), *differences])
        reported = reported_average([*benchmarks], results)
        rows += _paper_rows(reported, metrics, empty)
        sets = [benchmark.partition('.')[2] for benchmark in benchmarks]
        if metrics == ['mean']:  # accuracies may be averaged over sets with different metrics
            sets = [f'{set_name} ({measure(used[0])})' for set_name, used in zip(sets, benchmarks.values())]
        note = (f'mean of {len(sets)} sets: {", ".join(sets)}; %, 95 % bootstrap intervals, for which images are '
                f'drawn within each set{_source(reported)}')
        yield Table(f'Average: {name}', header, rows, note, 'averages')


def _comparison_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per kind: differences from the baseline, one row per benchmark, model and metric."""
    if 'comparison' not in results:
        return
    baseline = results['comparison']['baseline']
    for kind, title in _KINDS.items():
        rows = []
        for benchmark, entry in results['comparison']['benchmarks'].items():
            benchmark_kind, _, name = benchmark.partition('.')
            if benchmark_kind != kind:
                continue
            models = results[kind][name]['models']
            for model, compared in entry['models'].items():
                for metric in entry['metrics']:
                    rows.append([name, measure(metric), model, f'{models[baseline][metric]:.1f}',
                                 f'{models[model][metric]:.1f}', _difference(compared, metric)])
        if rows:
            header = ['set', 'number', 'model', f'of {baseline}', 'of the model', 'difference']
            note = '%, 95 % bootstrap intervals of the difference, for which the same images are drawn for both models'
            yield Table(f'Beside {baseline}: {title}', header, rows, note, f'comparison.{kind}')
