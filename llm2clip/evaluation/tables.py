# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of `results.json` for Markdown and HTML, with the numbers that papers report (`paper.yaml`)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_MEASURES = {
    'mean': 'mean', 'image_retrieval_recall@1': 'text→image R@1', 'text_retrieval_recall@1': 'image→text R@1',
    'zeroshot_top1': 'top-1', 'linear_probe_top1': 'top-1', 'mean_per_class': 'mean per class',
    'mean_average_precision': 'mAP',
}
_KINDS = {'retrieval': 'Retrieval', 'zeroshot': 'Zero-shot classification', 'linear_probe': 'Linear probe'}
_RETRIEVAL = {f'{way}_retrieval_recall@{k}': f'{arrow} R@{k}'
              for way, arrow in (('image', 'text→image'), ('text', 'image→text')) for k in (1, 5, 10)}
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
    about: str = ''
    """Topic: ``retrieval``, ``accuracy``, ``averages`` or ``cra``; for a comparison with a baseline,
    ``comparison.`` and the kind of the benchmarks, such as ``comparison.zeroshot``."""


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return all tables of a `results.json`."""
    return [*_cra_tables(results), *_retrieval_tables(results), *_accuracy_tables(results),
            *_average_tables(results), *_comparison_tables(results)]


def markdown(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown, below a note if the evaluation is incomplete."""
    missing = ', '.join(results.get('missing', []))
    parts = [f'**Partial: the evaluation did not come to its end. Missing: {missing}.**'] if missing else []
    for table in result_tables(results):
        lines = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'
                 for cells in (table.header, ['---'] * len(table.header), *table.rows)]
        parts.append(f'## {table.title}\n\n' + '\n'.join(lines) + (f'\n\n{table.note}' if table.note else ''))
    return '\n\n'.join(parts) + '\n'


def _cell(values: Mapping[str, Any], name: str) -> str:
    """`84.2 [82.9, 85.4]`; the interval is omitted if its ends are equal, for example if all answers are right."""
    if name not in values:
        return ''
    low, high = values.get('intervals', {}).get(name) or (0, 0)
    return f'{values[name]:.1f}' + (f' [{low:.1f}, {high:.1f}]' if low < high else '')


def _difference(compared: Mapping[str, Any], metric: str) -> str:
    """`-1.2 [-2.5, +0.1]`"""
    low, high = compared['intervals'].get(metric) or (0, 0)
    return f'{compared["difference"][metric]:+.1f}' + (f' [{low:+.1f}, {high:+.1f}]' if low < high else '')


def _remarks(values: Mapping[str, Mapping[str, Any]], images_of: Mapping[str, Mapping[str, Any]] = {}) -> str:
    """Remarks on truncated texts, images left out and bfloat16, for the models of a set or the sets of a model."""
    remarks = ''
    for what, key, of in (('texts that were too long and lost their end', 'n_truncated', values),
                          ('images left out since they have no caption of the set', 'n_without_caption', images_of)):
        counts = ', '.join(f'{name} {value[key]:,}' for name, value in of.items() if value.get(key))
        remarks += f'; {what}: {counts}' if counts else ''
    narrow = ', '.join(name for name, value in values.items() if value.get('precision') == 'amp_bf16')
    return remarks + (f'; computed in bfloat16: {narrow}' if narrow else '')


_LLM2CLIP, _PROCLIP = 'arXiv 2411.04997 v6', 'arXiv 2510.18795'
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
    return dict(zip(('text_retrieval_recall@1', 'image_retrieval_recall@1'), map(float, cell.split('/'))))


def _of_llm2clip(table: str, rows: Mapping[str, Mapping[str, float]]) -> Reported:
    return Reported(rows, f'{_LLM2CLIP}, table {table}') if rows else Reported({})


def reported_recalls(benchmark: str) -> Reported:
    """Return reported recall@1 of both directions on a retrieval set, by the name of its source, such as `coco`."""
    for table, (key, columns) in _COLUMNS.items():
        if benchmark in columns:
            return _of_llm2clip(table, {model: _recalls(cells.split()[columns.index(benchmark)])
                                        for model, cells in _PAPER[key].items()})
    return Reported({})


def reported_average(benchmarks: Sequence[str], results: Mapping[str, Any]) -> Reported:
    """Return reported means over benchmarks of one kind, named as in `results`, such as `zeroshot.food101`.  The metric
    is `mean` for accuracies and recall@1 of each direction for retrieval."""
    kind, names = benchmarks[0].partition('.')[0], [benchmark.partition('.')[2] for benchmark in benchmarks]
    proclip = _PAPER['proclip']
    if kind == 'zeroshot' and sorted(names) == sorted(proclip['sets']):
        return Reported({model: {'mean': mean} for model, mean in proclip['means'].items()}, f'{_PROCLIP}, table 2')
    if kind != 'retrieval':
        return Reported({})
    sets = [results[kind][name]['benchmark'] for name in names]
    if sets == ['xm3600'] * 36:
        return _of_llm2clip('2', {model: _recalls(cell) for model, cell in _PAPER['xm3600'].items()})
    for table, (_, columns) in _COLUMNS.items():
        if {*sets} <= {*columns}:
            of_sets = [reported_recalls(name).rows for name in sets]
            return _of_llm2clip(table, {
                model: {metric: sum(rows[model][metric] for rows in of_sets) / len(sets) for metric in numbers}
                for model, numbers in of_sets[0].items()})
    return Reported({})


def _paper_rows(reported: Reported, metrics: Sequence[str], empty: int = 0) -> list[list[str]]:
    """One row per model of a paper, with its numbers for `metrics` and `empty` empty cells."""
    return [[f'{model} (paper)', *(_cell(values, metric) for metric in metrics), *[''] * empty]
            for model, values in reported.rows.items()]


def _source(reported: Reported) -> str:
    """Remark on the source of a paper's numbers; empty if there are none."""
    return f'; paper: {reported.source}' if reported.rows else ''


def _cra_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Table of caption retrieval accuracy, if text encoders were evaluated."""
    if results.get('cra'):
        name = results.get('cra_name')
        paper = _PAPER['cra'].items() if name == 'coco' else ()
        reported = _of_llm2clip('A1', {model: {'CRA': value} for model, value in paper})
        rows = [[encoder, f'{value:.1f}'] for encoder, value in results['cra'].items()]
        counts = f'%, {results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else '%'
        narrow = '; computed in bfloat16' if results.get('cra_precision') == 'amp_bf16' else ''
        yield Table('Caption retrieval accuracy' + (f': {name}' if name else ''), ['encoder', 'CRA'],
                    rows + _paper_rows(reported, ['CRA']), counts + narrow + _source(reported), 'cra')


def _retrieval_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per benchmark; benchmarks with one model and no paper's numbers share one table per model."""
    def cells(values: Mapping[str, Any]) -> list[str]:
        mean_ranks = '/'.join(f'{values[f"{way}_retrieval_mean_rank"]:.1f}' for way in ('image', 'text'))
        return [*(_cell(values, key) for key in _RETRIEVAL), mean_ranks, f'{values["chance@10"]:.2f}']

    header, alone = [*_RETRIEVAL.values(), 'mean rank t→i/i→t', 'chance@10'], {}
    for name, entry in results.get('retrieval', {}).items():
        models, reported = entry['models'], reported_recalls(entry['benchmark'])
        first_model, first = next(iter(models.items()))
        if len(models) == 1 and not reported.rows:
            alone.setdefault(first_model, {})[name] = first
            continue
        rows = [[model, *cells(values)] for model, values in models.items()]
        yield Table(f'Retrieval: {name}', ['model', *header], rows + _paper_rows(reported, [*_RETRIEVAL], 2),
                    f'{first["n_images"]:,} images, {first["n_texts"]:,} texts; {_UNITS}{_source(reported)}'
                    f'{_remarks(models, {name: first})}', 'retrieval')
    for model, sets in alone.items():
        rows = [[name, f'{values["n_images"]:,}', f'{values["n_texts"]:,}', *cells(values)]
                for name, values in sets.items()]
        yield Table(f'Retrieval: {model}', ['set', 'images', 'texts', *header], rows, _UNITS + _remarks(sets, sets),
                    'retrieval')


def _accuracy_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per classification benchmark."""
    benchmarks = [(kind, *benchmark) for kind in ('zeroshot', 'linear_probe')
                  for benchmark in results.get(kind, {}).items()]
    for kind, name, entry in benchmarks:
        models, title = entry['models'], f'{_KINDS[kind]}: {name}'
        first = next(iter(models.values()))
        counts = f'{first["n_images"]:,} images, {first["n_classes"]:,} classes'
        if 'mean_average_precision' in first:
            rows = [[model, _cell(values, 'mean_average_precision')] for model, values in models.items()]
            yield Table(title, ['model', 'mAP'], rows, f'{counts}, any number of them per image; mean average '
                        f'precision in %{_remarks(models)}', 'accuracy')
            continue
        paper = _PAPER['accuracy'].get(f'{kind}.{name}', {}).items()
        reported = _of_llm2clip('3', {model: {f'{kind}_top1': value} for model, value in paper})
        rows = [[model, _cell(values, f'{kind}_top1'), _cell(values, f'{kind}_top5'),
                 f'{values["mean_per_class"]:.1f}', f'{100 / values["n_classes"]:.2f}']
                for model, values in models.items()]
        yield Table(title, ['model', 'top-1', 'top-5', 'mean per class', 'chance'],
                    rows + _paper_rows(reported, [f'{kind}_top1'], 3),
                    f'{counts}; %, 95 % bootstrap intervals{_source(reported)}{_remarks(models)}', 'accuracy')


def _average_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per average: one row per model, then the models of papers."""
    for name, average in results.get('averages', {}).items():
        benchmarks, models = average['benchmarks'], average['models']
        metrics = [metric for metric in _MEASURES if metric in next(iter(models.values()))]
        compared = metrics if 'comparison' in results else []
        rows = [[model, *(_cell(values, metric) for metric in metrics),
                 *(_difference(values['compared'], metric) if 'compared' in values else '' for metric in compared)]
                for model, values in models.items()]
        reported = reported_average([*benchmarks], results)
        header = ['model', *map(measure, metrics),
                  *(f'{measure(metric)} − {results["comparison"]["baseline"]}' for metric in compared)]
        numbers = [benchmark.partition('.')[2] + (f' ({measure(used[0])})' if metrics == ['mean'] else '')
                   for benchmark, used in benchmarks.items()]
        yield Table(f'Average: {name}', header, rows + _paper_rows(reported, metrics, len(compared)),
                    f'mean of {len(numbers)} sets: {", ".join(numbers)}; %, 95 % bootstrap intervals, for which images '
                    f'are drawn within each set{_source(reported)}', 'averages')


def _comparison_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per kind of benchmark: differences from the baseline, one row per benchmark, model and metric."""
    compare = results.get('comparison', {'benchmarks': {}})
    for kind, title in _KINDS.items():
        rows = []
        for benchmark, entry in compare['benchmarks'].items():
            of_kind, _, name = benchmark.partition('.')
            for model, compared in entry['models'].items() if of_kind == kind else ():
                numbers = results[kind][name]['models']
                rows += [[name, measure(metric), model, f'{numbers[compare["baseline"]][metric]:.1f}',
                          f'{numbers[model][metric]:.1f}', _difference(compared, metric)]
                         for metric in entry['metrics']]
        if rows:
            baseline = compare['baseline']
            yield Table(f'Beside {baseline}: {title}',
                        ['set', 'number', 'model', f'of {baseline}', 'of the model', 'difference'], rows,
                        '%, 95 % bootstrap intervals of the difference, for which the same images are drawn for both '
                        'models', f'comparison.{kind}')
