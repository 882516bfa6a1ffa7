# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Results -> tables, for Markdown and HTML alike."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from llm2clip.evaluation.paper import Reported, reported_accuracy, reported_average, reported_cra, reported_recalls

__all__ = [
    'Table', 'accuracy_tables', 'average_tables', 'comparison_tables', 'composition_tables', 'cra_tables',
    'curve_tables', 'markdown', 'measure', 'partial_note', 'query_length_tables', 'result_tables', 'retrieval_tables',
]

_MEASURES = {
    'mean': 'mean', 'image_retrieval_recall@1': 'text→image R@1', 'text_retrieval_recall@1': 'image→text R@1',
    'zeroshot_top1': 'top-1', 'linear_probe_top1': 'top-1', 'mean_per_class': 'mean per class',
    'mean_average_precision': 'mAP',
}
_KINDS = {'retrieval': 'Retrieval', 'zeroshot': 'Zero-shot classification', 'linear_probe': 'Linear probe',
          'composition': 'Composition'}
_RETRIEVAL = [(f'{way}_retrieval_recall@{k}', f'{arrow} R@{k}')
              for way, arrow in (('image', 'text→image'), ('text', 'image→text')) for k in (1, 5, 10)]
_RETRIEVAL_HEADER = [*(label for _, label in _RETRIEVAL), 'mean rank', 'chance@10']
_UNITS = 'recall in %, 95 % bootstrap intervals; ranks count from 1'


def measure(metric: str) -> str:
    """What tables call a number that stands for a benchmark."""
    return _MEASURES.get(metric, metric.replace('_', ' '))


class Table(NamedTuple):
    """A heading, column names and rows of cells."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ''


def _cell(values: Mapping[str, Any], name: str) -> str:
    """`84.2 [82.9, 85.4]`; without ends that are the same, as where all answers are right, or there is one."""
    if name not in values:
        return ''
    low, high = values.get('intervals', {}).get(name) or (0, 0)
    return f'{values[name]:.1f}' + (f' [{low:.1f}, {high:.1f}]' if low < high else '')


def _counts(what: str, key: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    """A remark on what sets, or models of one set, have counted under a key; nothing where all counts are 0."""
    counts = ', '.join(f'{name} {value[key]:,}' for name, value in values.items() if value.get(key))
    return f'; {what}: {counts}' if counts else ''


def _narrow(values: Mapping[str, Mapping[str, Any]]) -> str:
    """A remark on which models, or which sets, were computed in bfloat16; nothing where none was."""
    names = [name for name, value in values.items() if value.get('precision') == 'amp_bf16']
    return f'; computed in bfloat16: {", ".join(names)}' if names else ''


_truncated = partial(_counts, 'texts that were too long and lost their end', 'n_truncated')
_without_caption = partial(_counts, 'images left out since they have no caption of the set', 'n_without_caption')


def _retrieval_cells(values: Mapping[str, Any]) -> list[str]:
    mean_ranks = '/'.join(f'{values[f"{way}_retrieval_mean_rank"]:.1f}' for way in ('image', 'text'))
    return [*(_cell(values, key) for key, _ in _RETRIEVAL), mean_ranks, f'{values["chance@10"]:.2f}']


def _paper_rows(reported: Reported, metrics: Sequence[str], empty: int = 0) -> list[list[str]]:
    """A row for each model of a paper: what it has of these metrics, and empty cells."""
    return [[f'{model} (paper)', *(_cell(values, metric) for metric in metrics), *[''] * empty]
            for model, values in reported.rows.items()]


def _source(reported: Reported) -> str:
    """A remark on where a paper's numbers come from; nothing where there are none."""
    return f'; paper: {reported.source}' if reported.rows else ''


def _retrieval_table(name: str, models: Mapping[str, Mapping[str, Any]], reported: Reported) -> Table:
    """Models on one benchmark, the paper's among them."""
    rows = [[model, *_retrieval_cells(values)] for model, values in models.items()]
    rows += _paper_rows(reported, [key for key, _ in _RETRIEVAL], 2)
    first = next(iter(models.values()))
    return Table(f'Retrieval: {name}', ['model', *_RETRIEVAL_HEADER], rows,
                 f'{first["n_images"]:,} images, {first["n_texts"]:,} texts; {_UNITS}{_source(reported)}'
                 f'{_truncated(models)}{_without_caption({name: first})}{_narrow(models)}')


def _one_model_table(model: str, sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """One model on several benchmarks."""
    rows = [[name, f'{values["n_images"]:,}', f'{values["n_texts"]:,}', *_retrieval_cells(values)]
            for name, values in sets.items()]
    return Table(f'Retrieval: {model}', ['set', 'images', 'texts', *_RETRIEVAL_HEADER], rows,
                 _UNITS + _truncated(sets) + _without_caption(sets) + _narrow(sets))


def retrieval_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per benchmark of a `results.json`; but where nothing is compared, one per model."""
    tables: list[Table] = []
    alone: dict[str, dict[str, Any]] = {}
    for name, entry in results.get('retrieval', {}).items():
        reported = reported_recalls(entry['benchmark'], results.get('ablations', ()))
        if len(entry['models']) > 1 or reported.rows:
            tables.append(_retrieval_table(name, entry['models'], reported))
        else:
            (model, values), = entry['models'].items()
            alone.setdefault(model, {})[name] = values
    return tables + [_one_model_table(model, sets) for model, sets in alone.items()]


def query_length_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table of a `results.json`: models beside each other, for the texts of each length of each set."""
    rows, compare = [], results.get('compare', {'benchmarks': {}})
    for name, entry in results.get('retrieval', {}).items():
        compared = compare['benchmarks'].get(f'retrieval.{name}', {'models': {}})['models']
        for length in next(iter(entry['models'].values())).get('by_length', {}):
            for model, values in entry['models'].items():
                of_length = values['by_length'][length]
                rows.append([name, length.replace('-', '–'), f'{of_length["n_texts"]:,}', model,
                             *(_cell(of_length, f'image_retrieval_recall@{k}') for k in (1, 5, 10))])
                if 'baseline' in compare:
                    rows[-1].append(_difference(compared[model]['by_length'][length], 'image_retrieval_recall@1')
                                    if model in compared else '')
    header = ['set', 'words', 'texts', 'model', *(f'text→image R@{k}' for k in (1, 5, 10))]
    if 'baseline' in compare:
        header.append(f'R@1 − {compare["baseline"]}')
    note = ('recall in %, 95 % bootstrap intervals; words are what white space separates, so that a text in Chinese, '
            'Japanese or Thai mostly counts as one')
    return [Table('Retrieval by query length', header, rows, note)] if rows else []


def _accuracy_table(title: str, kind: str, name: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(models.values()))
    counts = f'{first["n_images"]:,} images, {first["n_classes"]:,} classes'
    more = _truncated(models) + _narrow(models)
    if 'mean_average_precision' in first:
        return Table(title, ['model', 'mAP'], [[model, _cell(values, 'mean_average_precision')]
                                               for model, values in models.items()],
                     f'{counts}, any number of them per image; mean average precision in %{more}')
    rows = [[model, _cell(values, f'{kind}_top1'), _cell(values, f'{kind}_top5'), f'{values["mean_per_class"]:.1f}',
             f'{100 / values["n_classes"]:.2f}'] for model, values in models.items()]
    reported = reported_accuracy(kind, name)
    rows += _paper_rows(reported, [f'{kind}_top1'], 3)
    return Table(title, ['model', 'top-1', 'top-5', 'mean per class', 'chance'], rows,
                 f'{counts}; %, 95 % bootstrap intervals{_source(reported)}{more}')


def accuracy_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per classification benchmark of a `results.json`."""
    return [_accuracy_table(f'{_KINDS[kind]}: {name}', kind, name, entry['models'])
            for kind in ('zeroshot', 'linear_probe') for name, entry in results.get(kind, {}).items()]


def _difference(compared: Mapping[str, Any], metric: str) -> str:
    """`-1.2 [-2.5, +0.1]`"""
    low, high = compared['intervals'].get(metric) or (0, 0)
    return f'{compared["difference"][metric]:+.1f}' + (f' [{low:+.1f}, {high:+.1f}]' if low < high else '')


def _average_table(name: str, average: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    """Models on several benchmarks at once, those of papers among them."""
    benchmarks, models = average['benchmarks'], average['models']
    metrics = [metric for metric in _MEASURES if metric in next(iter(models.values()))]
    compared = metrics if 'compare' in results else []
    rows = [[model, *(_cell(values, metric) for metric in metrics),
             *(_difference(values['compared'], metric) if 'compared' in values else '' for metric in compared)]
            for model, values in models.items()]
    reported = reported_average([*benchmarks], results, results.get('ablations', ()))
    rows += _paper_rows(reported, metrics, len(compared))
    header = ['model', *map(measure, metrics),
              *(f'{measure(metric)} − {results["compare"]["baseline"]}' for metric in compared)]
    numbers = [benchmark.partition('.')[2] + (f' ({measure(used[0])})' if metrics == ['mean'] else '')
               for benchmark, used in benchmarks.items()]
    return Table(f'Average: {name}', header, rows, f'mean of {len(numbers)} sets: {", ".join(numbers)}; %, 95 % '
                 f'bootstrap intervals, for which images are drawn within each set{_source(reported)}')


def average_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per average of a `results.json`."""
    return [_average_table(name, average, results) for name, average in results.get('averages', {}).items()]


def _comparison_table(kind: str, benchmarks: Mapping[str, Any], baseline: str, results: Mapping[str, Any]) -> Table:
    """Models beside a baseline on all benchmarks of a kind, a row for each number."""
    rows, per_class = [], kind in ('zeroshot', 'linear_probe')
    for name, entry in benchmarks.items():
        numbers = results[kind][name]['models']
        for model, compared in entry['models'].items():
            for metric in entry['metrics']:
                rows.append([name, measure(metric), model, f'{numbers[baseline][metric]:.1f}',
                             f'{numbers[model][metric]:.1f}', _difference(compared, metric)])
                if per_class:
                    fallen = (f'{c} {-points:+.1f}' for c, points in compared['forgotten'].items())
                    rows[-1] += [f'{compared[key]:,}' if key in compared else '' for key in ('lost', 'gained')]
                    rows[-1].append(', '.join(fallen))
    header = ['set', 'number', 'model', f'of {baseline}', 'of the model', 'difference']
    note = '%, 95 % bootstrap intervals of the difference, for which the same images are drawn for both models'
    if per_class:
        header += ['lost', 'gained', 'forgotten']
        note += (f'; lost: images that {baseline} has right and the model wrong; gained: the other way round; '
                 'forgotten: the classes that have lost most, in points, where classes have few images also by chance')
    return Table(f'Beside {baseline}: {_KINDS[kind]}', header, rows, note)


def comparison_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Kind of benchmark -> a table of those on which a `results.json` has models beside a baseline."""
    compare = results.get('compare', {'benchmarks': {}})
    kinds: dict[str, dict[str, Any]] = {}
    for benchmark, entry in compare['benchmarks'].items():
        kind, _, name = benchmark.partition('.')
        if entry['models']:
            kinds.setdefault(kind, {})[name] = entry
    return {kind: _comparison_table(kind, benchmarks, compare['baseline'], results)
            for kind, benchmarks in kinds.items()}


def _composition_table(name: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Models on one set, below them chance."""
    first = next(iter(models.values()))
    numbers = first['chance']
    rows = [[model, *(_cell(values, number) for number in numbers)] for model, values in models.items()]
    return Table(f'Composition: {name}', ['model', *(number.replace('_', ' ') for number in numbers)],
                 [*rows, ['chance', *(f'{value:.1f}' for value in numbers.values())]],
                 f'{first["n_examples"]:,} examples of {first["n_images"]:,} images and {first["n_texts"]:,} texts; '
                 f'%, 95 % bootstrap intervals{_truncated(models)}{_narrow(models)}')


def composition_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per set of a `results.json` whose texts are much alike."""
    return [_composition_table(name, entry['models']) for name, entry in results.get('composition', {}).items()]


def _curve_table(curve: Mapping[str, Any]) -> Table:
    """A row for each model between two benchmarks, as `curve_points` has them."""
    rows = [[name, f'{point["interpolate"]:g}' if 'interpolate' in point else '', f'{point["old"]:.1f}',
             f'{point["new"]:.1f}'] for name, point in curve['models'].items()]
    return Table('Old and new', ['model', 'interpolate', curve['old'], curve['new']], rows,
                 'top-1 accuracy, or the mean of R@1 text→image and image→text, in %; interpolate: 0 the weights that '
                 'the run began with, 1 those that it ended with')


def curve_tables(results: Mapping[str, Any]) -> list[Table]:
    """The table of the curve of a `results.json`, if it has one."""
    return [_curve_table(results['curve'])] if results.get('curve', {}).get('models') else []


def cra_tables(results: Mapping[str, Any]) -> list[Table]:
    """The table of the text encoders of a `results.json`, if it has any, the paper's among them."""
    if not results.get('cra'):
        return []
    name = results.get('cra_name')
    reported = reported_cra(name)
    rows = [[encoder, f'{value:.1f}'] for encoder, value in results['cra'].items()] + _paper_rows(reported, ['CRA'])
    counts = f'%, {results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else '%'
    narrow = '; computed in bfloat16' if results.get('cra_precision') == 'amp_bf16' else ''
    return [Table('Caption retrieval accuracy' + (f': {name}' if name else ''), ['encoder', 'CRA'], rows,
                  counts + narrow + _source(reported))]


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table of a `results.json`."""
    return [*retrieval_tables(results), *query_length_tables(results), *accuracy_tables(results),
            *composition_tables(results), *average_tables(results), *comparison_tables(results).values(),
            *curve_tables(results), *cra_tables(results)]


def partial_note(results: Mapping[str, Any]) -> str:
    """In words, that an evaluation did not come to its end and what is missing; of a finished one, nothing."""
    missing = results.get('missing')
    return f'Partial: the evaluation did not come to its end. Missing: {", ".join(missing)}.' if missing else ''


def _line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def markdown(tables: Sequence[Table], note: str = '') -> str:
    """All tables as Markdown, below a note."""
    parts = [f'**{note}**'] if note else []
    for table in tables:
        lines = [_line(table.header), _line(['---'] * len(table.header)), *map(_line, table.rows)]
        parts.append(f'## {table.title}\n\n' + '\n'.join(lines) + (f'\n\n{table.note}' if table.note else ''))
    return '\n\n'.join(parts) + '\n'
