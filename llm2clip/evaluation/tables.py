# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`results.json` -> tables, for Markdown and HTML alike."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm2clip.evaluation.paper import Reported, reported_accuracy, reported_average, reported_cra, reported_recalls

__all__ = ['Table', 'markdown', 'measure', 'partial_note', 'result_tables']

_MEASURES = {
    'mean': 'mean', 'image_retrieval_recall@1': 'text→image R@1', 'text_retrieval_recall@1': 'image→text R@1',
    'zeroshot_top1': 'top-1', 'linear_probe_top1': 'top-1', 'mean_per_class': 'mean per class',
    'mean_average_precision': 'mAP',
}
_KINDS = {'retrieval': 'Retrieval', 'zeroshot': 'Zero-shot classification', 'linear_probe': 'Linear probe',
          'composition': 'Composition'}
_RETRIEVAL = {f'{way}_retrieval_recall@{k}': f'{arrow} R@{k}'
              for way, arrow in (('image', 'text→image'), ('text', 'image→text')) for k in (1, 5, 10)}
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
    about: str = ''
    """What it shows: ``retrieval``, ``lengths``, ``accuracy``, ``composition``, ``averages`` or ``cra``; of a
    comparison with a baseline, the kind of its benchmarks, such as ``compare.zeroshot``."""


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table of a `results.json`."""
    return [*_cra_tables(results), *_retrieval_tables(results), *_length_tables(results), *_accuracy_tables(results),
            *_composition_tables(results), *_average_tables(results), *_comparison_tables(results)]


def partial_note(results: Mapping[str, Any]) -> str:
    """In words, that an evaluation did not come to its end and what is missing; of a finished one, nothing."""
    missing = results.get('missing')
    return f'Partial: the evaluation did not come to its end. Missing: {", ".join(missing)}.' if missing else ''


def markdown(tables: Sequence[Table], note: str = '') -> str:
    """All tables as Markdown, below a note."""
    parts = [f'**{note}**'] if note else []
    for table in tables:
        lines = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'
                 for cells in (table.header, ['---'] * len(table.header), *table.rows)]
        parts.append(f'## {table.title}\n\n' + '\n'.join(lines) + (f'\n\n{table.note}' if table.note else ''))
    return '\n\n'.join(parts) + '\n'


def _cell(values: Mapping[str, Any], name: str) -> str:
    """`84.2 [82.9, 85.4]`; without ends that are the same, as where all answers are right, or there is one."""
    if name not in values:
        return ''
    low, high = values.get('intervals', {}).get(name) or (0, 0)
    return f'{values[name]:.1f}' + (f' [{low:.1f}, {high:.1f}]' if low < high else '')


def _difference(compared: Mapping[str, Any], metric: str) -> str:
    """`-1.2 [-2.5, +0.1]`"""
    low, high = compared['intervals'].get(metric) or (0, 0)
    return f'{compared["difference"][metric]:+.1f}' + (f' [{low:+.1f}, {high:+.1f}]' if low < high else '')


def _remarks(values: Mapping[str, Mapping[str, Any]], images_of: Mapping[str, Mapping[str, Any]] = {}) -> str:
    """What sets, or models of one set, have cut or left out, and which were computed in bfloat16, if any."""
    remarks = ''
    for what, key, of in (('texts that were too long and lost their end', 'n_truncated', values),
                          ('images left out since they have no caption of the set', 'n_without_caption', images_of)):
        counts = ', '.join(f'{name} {value[key]:,}' for name, value in of.items() if value.get(key))
        remarks += f'; {what}: {counts}' if counts else ''
    narrow = ', '.join(name for name, value in values.items() if value.get('precision') == 'amp_bf16')
    return remarks + (f'; computed in bfloat16: {narrow}' if narrow else '')


def _paper_rows(reported: Reported, metrics: Sequence[str], empty: int = 0) -> list[list[str]]:
    """A row for each model of a paper: what it has of these metrics, and empty cells."""
    return [[f'{model} (paper)', *(_cell(values, metric) for metric in metrics), *[''] * empty]
            for model, values in reported.rows.items()]


def _source(reported: Reported) -> str:
    """A remark on where a paper's numbers come from; nothing where there are none."""
    return f'; paper: {reported.source}' if reported.rows else ''


def _cra_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """The table of the text encoders, if there are any."""
    if results.get('cra'):
        name = results.get('cra_name')
        reported = reported_cra(name)
        rows = [[encoder, f'{value:.1f}'] for encoder, value in results['cra'].items()]
        counts = f'%, {results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else '%'
        narrow = '; computed in bfloat16' if results.get('cra_precision') == 'amp_bf16' else ''
        yield Table('Caption retrieval accuracy' + (f': {name}' if name else ''), ['encoder', 'CRA'],
                    rows + _paper_rows(reported, ['CRA']), counts + narrow + _source(reported), 'cra')


def _retrieval_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per benchmark; but where nothing is compared, one per model."""
    def cells(values: Mapping[str, Any]) -> list[str]:
        mean_ranks = '/'.join(f'{values[f"{way}_retrieval_mean_rank"]:.1f}' for way in ('image', 'text'))
        return [*(_cell(values, key) for key in _RETRIEVAL), mean_ranks, f'{values["chance@10"]:.2f}']

    header, alone = [*_RETRIEVAL.values(), 'mean rank', 'chance@10'], {}
    for name, entry in results.get('retrieval', {}).items():
        models, reported = entry['models'], reported_recalls(entry['benchmark'], results.get('ablations', ()))
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


def _length_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table: models beside each other, for the texts of each length of each set."""
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
    if rows:
        yield Table('Retrieval by query length', header, rows,
                    'recall in %, 95 % bootstrap intervals; words are what white space separates, so that a text in '
                    'Chinese, Japanese or Thai mostly counts as one', 'lengths')


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
        reported = reported_accuracy(kind, name)
        rows = [[model, _cell(values, f'{kind}_top1'), _cell(values, f'{kind}_top5'),
                 f'{values["mean_per_class"]:.1f}', f'{100 / values["n_classes"]:.2f}']
                for model, values in models.items()]
        yield Table(title, ['model', 'top-1', 'top-5', 'mean per class', 'chance'],
                    rows + _paper_rows(reported, [f'{kind}_top1'], 3),
                    f'{counts}; %, 95 % bootstrap intervals{_source(reported)}{_remarks(models)}', 'accuracy')


def _composition_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per set whose texts are much alike: models, below them chance."""
    for name, entry in results.get('composition', {}).items():
        models, first = entry['models'], next(iter(entry['models'].values()))
        numbers = first['chance']
        rows = [[model, *(_cell(values, number) for number in numbers)] for model, values in models.items()]
        yield Table(f'Composition: {name}', ['model', *(number.replace('_', ' ') for number in numbers)],
                    [*rows, ['chance', *(f'{value:.1f}' for value in numbers.values())]],
                    f'{first["n_examples"]:,} examples of {first["n_images"]:,} images and {first["n_texts"]:,} texts; '
                    f'%, 95 % bootstrap intervals{_remarks(models)}', 'composition')


def _average_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per average: models on several benchmarks at once, those of papers among them."""
    for name, average in results.get('averages', {}).items():
        benchmarks, models = average['benchmarks'], average['models']
        metrics = [metric for metric in _MEASURES if metric in next(iter(models.values()))]
        compared = metrics if 'compare' in results else []
        rows = [[model, *(_cell(values, metric) for metric in metrics),
                 *(_difference(values['compared'], metric) if 'compared' in values else '' for metric in compared)]
                for model, values in models.items()]
        reported = reported_average([*benchmarks], results, results.get('ablations', ()))
        header = ['model', *map(measure, metrics),
                  *(f'{measure(metric)} − {results["compare"]["baseline"]}' for metric in compared)]
        numbers = [benchmark.partition('.')[2] + (f' ({measure(used[0])})' if metrics == ['mean'] else '')
                   for benchmark, used in benchmarks.items()]
        yield Table(f'Average: {name}', header, rows + _paper_rows(reported, metrics, len(compared)),
                    f'mean of {len(numbers)} sets: {", ".join(numbers)}; %, 95 % bootstrap intervals, for which images '
                    f'are drawn within each set{_source(reported)}', 'averages')


def _comparison_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One table per kind of benchmark: models beside a baseline, a row for each number."""
    compare = results.get('compare', {'benchmarks': {}})
    for kind, title in _KINDS.items():
        rows, per_class = [], kind in ('zeroshot', 'linear_probe')
        for benchmark, entry in compare['benchmarks'].items():
            of_kind, _, name = benchmark.partition('.')
            for model, compared in entry['models'].items() if of_kind == kind else ():
                numbers = results[kind][name]['models']
                for metric in entry['metrics']:
                    rows.append([name, measure(metric), model, f'{numbers[compare["baseline"]][metric]:.1f}',
                                 f'{numbers[model][metric]:.1f}', _difference(compared, metric)])
                    if per_class:
                        rows[-1] += [f'{compared[key]:,}' if key in compared else '' for key in ('lost', 'gained')]
                        rows[-1].append(', '.join(f'{c} {-points:+.1f}' for c, points in compared['forgotten'].items()))
        if rows:
            baseline = compare['baseline']
            header = ['set', 'number', 'model', f'of {baseline}', 'of the model', 'difference']
            note = '%, 95 % bootstrap intervals of the difference, for which the same images are drawn for both models'
            if per_class:
                header += ['lost', 'gained', 'forgotten']
                note += (f'; lost: images that {baseline} has right and the model wrong; gained: the other way round; '
                         'forgotten: the classes that have lost most, in points, where classes have few images also '
                         'by chance')
            yield Table(f'Beside {baseline}: {title}', header, rows, note, f'compare.{kind}')
