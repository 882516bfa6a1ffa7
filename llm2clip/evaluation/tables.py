# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Results -> tables, for Markdown and HTML alike."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm2clip.evaluation.paper import PAPER

__all__ = ['Table', 'markdown', 'partial_note', 'result_tables']

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
    # A space that does not break, so that a narrow table has the interval on a line of its own.
    return f'{values[name]:.1f}' + (f' [{interval[0]:.1f},\N{NO-BREAK SPACE}{interval[1]:.1f}]' if interval else '')


def _truncated(values: Mapping[str, Mapping[str, Any]]) -> str:
    """A remark on texts that lost their end, if any did."""
    cut = {name: value['n_truncated'] for name, value in values.items() if value.get('n_truncated')}
    return f'; texts that were too long and lost their end: {_listed(cut)}' if cut else ''


def _without_caption(values: Mapping[str, Mapping[str, Any]]) -> str:
    """A remark on images that were left out, for sets or models of one set."""
    counts = {name: value['n_without_caption'] for name, value in values.items() if value.get('n_without_caption')}
    return f'; images left out since they have no caption of the set: {_listed(counts)}' if counts else ''


def _listed(counts: Mapping[str, int]) -> str:
    return ', '.join(f'{name} {count:,}' for name, count in counts.items())


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
                 f'{_without_caption({name: first})}')


def _one_model_table(model: str, sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """One model on several benchmarks."""
    rows = [[name, f'{values["n_images"]:,}', f'{values["n_texts"]:,}', *_retrieval_cells(values)]
            for name, values in sets.items()]
    return Table(f'Retrieval: {model}', ['set', 'images', 'texts', *_RETRIEVAL_HEADER], rows,
                 _UNITS + _truncated(sets) + _without_caption(sets))


def _retrieval_tables(entries: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """One table per benchmark; but where nothing is compared, one per model."""
    tables: list[Table] = []
    alone: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        if len(entry['models']) > 1 or entry['benchmark'] in PAPER:
            tables.append(_retrieval_table(name, entry['benchmark'], entry['models']))
        else:
            (model, values), = entry['models'].items()
            alone.setdefault(model, {})[name] = values
    return tables + [_one_model_table(model, sets) for model, sets in alone.items()]


def _accuracy_table(title: str, name: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[model, _cell(values, f'{name}_top1'), _cell(values, f'{name}_top5'), f'{values["mean_per_class"]:.1f}',
             f'{100 / values["n_classes"]:.2f}'] for model, values in models.items()]
    first = next(iter(models.values()))
    return Table(title, ['model', 'top-1', 'top-5', 'mean per class', 'chance'], rows,
                 f'{first["n_images"]:,} images, {first["n_classes"]:,} classes; %, 95 % bootstrap intervals'
                 f'{_truncated(models)}')


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table of a `results.json`."""
    tables = _retrieval_tables(results.get('retrieval', {}))
    for kind, title in (('zeroshot', 'Zero-shot classification'), ('linear_probe', 'Linear probe')):
        tables += [_accuracy_table(f'{title}: {name}', kind, entry['models'])
                   for name, entry in results.get(kind, {}).items()]
    if results.get('cra'):
        tables.append(Table('Caption retrieval accuracy', ['encoder', 'CRA'],
                            [[name, f'{value:.1f}'] for name, value in results['cra'].items()],
                            f'%, {results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else '%'))
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
