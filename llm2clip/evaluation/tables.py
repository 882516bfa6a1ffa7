# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Results -> tables, for Markdown and HTML alike."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

__all__ = [
    'MEASURES', 'PAPER', 'PROCLIP', 'Table', 'accuracy_tables', 'average_tables', 'comparison_tables',
    'composition_tables', 'curve_tables', 'markdown', 'partial_note', 'result_tables', 'retrieval_tables',
]

_PAPER_SETS = ('flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci')
_PAPER_ROWS = {
    'CLIP L/14-224': '85.2/65.0 56.3/36.5 84.2/83.6 68.3/55.6 63.1/65.8',
    'CLIP L/14-224 + LLM2CLIP 15M': '93.0/83.5 67.4/56.4 98.7/98.6 91.5/94.1 88.3/90.4',
    'CLIP L/14-336': '87.7/67.0 58.0/37.1 86.2/84.0 72.8/57.0 67.4/65.7',
    'CLIP L/14-336 + LLM2CLIP 15M': '91.2/82.1 65.5/53.6 98.1/98.4 90.3/93.2 87.7/89.0',
    'EVA02 L/14-224': '89.7/77.3 63.7/47.5 91.9/89.3 73.3/68.5 73.5/75.0',
    'EVA02 L/14-224 + LLM2CLIP 3M': '94.3/84.3 65.2/56.0 98.0/98.0 91.0/94.7 87.8/90.7',
    'EVA02 L/14-224 + LLM2CLIP 15M': '94.6/85.0 69.5/58.3 98.9/99.1 93.6/95.7 89.8/91.2',
    'EVA02 L/14-224 + LLM2CLIP 60M': '95.9/85.1 71.7/58.5 99.2/99.2 95.2/97.0 90.1/92.0',
    'SigLIP2 SO/14-224': '93.9/82.9 72.0/55.5 90.2/87.2 75.7/74.5 77.0/78.9',
    'SigLIP2 SO/14-224 + LLM2CLIP 60M': '95.2/84.6 73.7/57.6 99.4/99.4 96.2/97.3 91.5/92.9',
}

PAPER: dict[str, dict[str, dict[str, float]]] = {
    column: {
        name: dict(zip(('text_retrieval_recall@1', 'image_retrieval_recall@1'),
                       map(float, cells.split()[i].split('/'))))
        for name, cells in _PAPER_ROWS.items()}
    for i, column in enumerate(_PAPER_SETS)}
"""What the paper reports (arXiv 2411.04997 v5, table 1): benchmark -> model -> recall@1, image to text and text to
image, in percent."""

_PROCLIP_SETS = ('food101', 'vtab-cifar10', 'vtab-cifar100', 'sun397', 'cars', 'fgvc_aircraft', 'vtab-dtd', 'vtab-pets',
                 'vtab-caltech101', 'vtab-flowers', 'imagenet1k')
PROCLIP = {
    'CLIP B/16': 68.3, 'CLIP B/16 + LLM2CLIP 30M': 53.0, 'CLIP B/16 + ProCLIP 30M': 63.0,
    'CLIP L/14': 75.7, 'CLIP L/14 + LLM2CLIP 30M': 57.5, 'CLIP L/14 + ProCLIP 30M': 71.0,
    'EVA02 L/14': 80.3, 'EVA02 L/14 + LLM2CLIP 3M': 57.5, 'EVA02 L/14 + ProCLIP 3M': 68.5,
}
"""What ProCLIP reports (arXiv 2510.18795, table 2, also in https://github.com/VisionXLab/ProCLIP as
assets/classification.png): model -> mean accuracy on the sets of `yamls/eval/sets/proclip11.yaml`, in percent."""

MEASURES = {
    'mean': 'mean', 'image_retrieval_recall@1': 'text→image R@1', 'text_retrieval_recall@1': 'image→text R@1',
    'zeroshot_top1': 'top-1', 'linear_probe_top1': 'top-1', 'mean_per_class': 'mean per class',
    'mean_average_precision': 'mAP',
}
"""Numbers that stand for a benchmark -> what tables call them."""

_KINDS = {'retrieval': 'Retrieval', 'zeroshot': 'Zero-shot classification', 'linear_probe': 'Linear probe'}
_RETRIEVAL = [(f'{way}_retrieval_recall@{k}', f'{arrow} R@{k}')
              for way, arrow in (('image', 'text→image'), ('text', 'image→text')) for k in (1, 5, 10)]
_RETRIEVAL_HEADER = [*(label for _, label in _RETRIEVAL), 'mean rank', 'chance@10']
_UNITS = 'recall in %, 95 % bootstrap intervals; ranks count from 1'


class Table(NamedTuple):
    """A heading, column names and rows of cells."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ''


def _cell(values: Mapping[str, Any], name: str) -> str:
    """`84.2 [82.9, 85.4]`"""
    if name not in values:
        return ''
    interval = values.get('intervals', {}).get(name)
    return f'{values[name]:.1f}' + (f' [{interval[0]:.1f}, {interval[1]:.1f}]' if interval else '')


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


def _retrieval_table(name: str, benchmark: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Models on one benchmark, the paper's among them."""
    rows = [[model, *_retrieval_cells(values)] for model, values in models.items()]
    for model, values in PAPER.get(benchmark, {}).items():
        rows.append([f'{model} (paper)', *(_cell(values, key) for key, _ in _RETRIEVAL), '', ''])
    first = next(iter(models.values()))
    return Table(f'Retrieval: {name}', ['model', *_RETRIEVAL_HEADER], rows,
                 f'{first["n_images"]:,} images, {first["n_texts"]:,} texts; {_UNITS}{_truncated(models)}'
                 f'{_without_caption({name: first})}{_narrow(models)}')


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
        if len(entry['models']) > 1 or entry['benchmark'] in PAPER:
            tables.append(_retrieval_table(name, entry['benchmark'], entry['models']))
        else:
            (model, values), = entry['models'].items()
            alone.setdefault(model, {})[name] = values
    return tables + [_one_model_table(model, sets) for model, sets in alone.items()]


def _accuracy_table(title: str, name: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(models.values()))
    counts = f'{first["n_images"]:,} images, {first["n_classes"]:,} classes'
    more = _truncated(models) + _narrow(models)
    if 'mean_average_precision' in first:
        return Table(title, ['model', 'mAP'], [[model, _cell(values, 'mean_average_precision')]
                                               for model, values in models.items()],
                     f'{counts}, any number of them per image; mean average precision in %{more}')
    rows = [[model, _cell(values, f'{name}_top1'), _cell(values, f'{name}_top5'), f'{values["mean_per_class"]:.1f}',
             f'{100 / values["n_classes"]:.2f}'] for model, values in models.items()]
    return Table(title, ['model', 'top-1', 'top-5', 'mean per class', 'chance'], rows,
                 f'{counts}; %, 95 % bootstrap intervals{more}')


def accuracy_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per classification benchmark of a `results.json`."""
    return [_accuracy_table(f'{_KINDS[kind]}: {name}', kind, entry['models'])
            for kind in ('zeroshot', 'linear_probe') for name, entry in results.get(kind, {}).items()]


def _difference(compared: Mapping[str, Any], metric: str) -> str:
    """`-1.2 [-2.5, +0.1]`"""
    interval = compared['intervals'].get(metric)
    return f'{compared["difference"][metric]:+.1f}' + (f' [{interval[0]:+.1f}, {interval[1]:+.1f}]' if interval else '')


def _paper_average(benchmarks: Sequence[str], results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Model -> metric -> mean of what a paper reports on these benchmarks, if it reports all of them."""
    kind, names = benchmarks[0].partition('.')[0], [benchmark.partition('.')[2] for benchmark in benchmarks]
    if kind == 'zeroshot' and sorted(names) == sorted(_PROCLIP_SETS):
        return {model: {'mean': mean} for model, mean in PROCLIP.items()}
    sets = [results[kind][name]['benchmark'] for name in names]
    if kind != 'retrieval' or not all(name in PAPER for name in sets):
        return {}
    return {model: {metric: sum(PAPER[name][model][metric] for name in sets) / len(sets) for metric in recalls}
            for model, recalls in PAPER[sets[0]].items()}


def _average_table(name: str, average: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    """Models on several benchmarks at once, those of papers among them."""
    benchmarks, models = average['benchmarks'], average['models']
    metrics = [metric for metric in MEASURES if metric in next(iter(models.values()))]
    compared = metrics if 'compare' in results else []
    rows = [[model, *(_cell(values, metric) for metric in metrics),
             *(_difference(values['compared'], metric) if 'compared' in values else '' for metric in compared)]
            for model, values in models.items()]
    paper = _paper_average([*benchmarks], results)
    for model, values in paper.items():
        rows.append([f'{model} (paper)', *(_cell(values, metric) for metric in metrics), *('' for _ in compared)])
    header = ['model', *(MEASURES[metric] for metric in metrics),
              *(f'{MEASURES[metric]} − {results["compare"]["baseline"]}' for metric in compared)]
    numbers = [benchmark.partition('.')[2] + (f' ({MEASURES[used[0]]})' if metrics == ['mean'] else '')
               for benchmark, used in benchmarks.items()]
    source = '; paper: what ProCLIP reports (arXiv 2510.18795)' if paper and metrics == ['mean'] else ''
    return Table(f'Average: {name}', header, rows, f'mean of {len(numbers)} sets: {", ".join(numbers)}; %, 95 % '
                 f'bootstrap intervals, for which images are drawn within each set{source}')


def average_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per average of a `results.json`."""
    return [_average_table(name, average, results) for name, average in results.get('averages', {}).items()]


def _comparison_table(kind: str, benchmarks: Mapping[str, Any], baseline: str, results: Mapping[str, Any]) -> Table:
    """Models beside a baseline on all benchmarks of a kind, a row for each number."""
    rows = []
    for name, entry in benchmarks.items():
        numbers = results[kind][name]['models']
        for model, compared in entry['models'].items():
            for metric in entry['metrics']:
                rows.append([name, MEASURES[metric], model, f'{numbers[baseline][metric]:.1f}',
                             f'{numbers[model][metric]:.1f}', _difference(compared, metric)])
                if kind != 'retrieval':
                    fallen = (f'{c} {-points:+.1f}' for c, points in compared['forgotten'].items())
                    rows[-1] += [f'{compared[key]:,}' if key in compared else '' for key in ('lost', 'gained')]
                    rows[-1].append(', '.join(fallen))
    header = ['set', 'number', 'model', f'of {baseline}', 'of the model', 'difference']
    note = '%, 95 % bootstrap intervals of the difference, for which the same images are drawn for both models'
    if kind != 'retrieval':
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


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table of a `results.json`."""
    tables = [*retrieval_tables(results), *accuracy_tables(results), *composition_tables(results),
              *average_tables(results), *comparison_tables(results).values(), *curve_tables(results)]
    if results.get('cra'):
        narrow = '; computed in bfloat16' if results.get('cra_precision') == 'amp_bf16' else ''
        tables.append(Table('Caption retrieval accuracy', ['encoder', 'CRA'],
                            [[name, f'{value:.1f}'] for name, value in results['cra'].items()],
                            (f'%, {results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else '%') + narrow))
    return tables


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
