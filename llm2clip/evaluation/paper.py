# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What papers report, in percent, to stand beside the numbers of an evaluation; `paper.yaml` has it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import yaml

__all__ = [
    'RECALLS', 'Reported', 'reported_accuracy', 'reported_average', 'reported_cra', 'reported_recalls',
]

_LLM2CLIP, _PROCLIP = 'arXiv 2411.04997 v6', 'arXiv 2510.18795'
_LANGUAGES = 36
_PAPER = yaml.safe_load(Path(__file__).with_name('paper.yaml').read_text('utf-8'))

# Metric -> percent.
Numbers = dict[str, float]


def _recalls(cell: str) -> Numbers:
    """Of `image→text/text→image`."""
    return dict(zip(('text_retrieval_recall@1', 'image_retrieval_recall@1'), map(float, cell.split('/'))))


def _by_set(rows: Mapping[str, str], sets: Sequence[str], prefix: str = '') -> dict[str, dict[str, Numbers]]:
    return {name: {prefix + model: _recalls(cells.split()[i]) for model, cells in rows.items()}
            for i, name in enumerate(sets)}


RECALLS = {
    table: _by_set(rows, ('flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci'), '' if table == '1' else f'{table}: ')
    for table, rows in _PAPER['five_sets'].items()}
RECALLS['2'] = _by_set(_PAPER['chinese'], ('flickr_cn', 'coco_cn'))
"""Table of LLM2CLIP's paper -> benchmark -> model -> recall@1."""


class Reported(NamedTuple):
    """What a paper has beside a benchmark or an average."""

    rows: Mapping[str, Numbers]
    """Model -> metric -> percent; none where it has nothing."""
    source: str = ''
    """Paper and tables."""


def _llm2clip(rows: Mapping[str, Mapping[str, Numbers]]) -> Reported:
    """Of table -> rows."""
    found = {model: numbers for of_table in rows.values() for model, numbers in of_table.items()}
    return Reported(found, f'{_LLM2CLIP}, table{"s" if len(rows) > 1 else ""} {", ".join(rows)}' if rows else '')


def reported_recalls(benchmark: str, ablations: Sequence[str] = ()) -> Reported:
    """Recall@1 of both directions.

    Args:
        benchmark: Name of a source of retrieval benchmarks, such as `coco`.
        ablations: Tables that are wanted besides 1 and 2.
    """
    return _llm2clip({table: RECALLS[table][benchmark] for table in ('1', '2', *ablations)
                      if benchmark in RECALLS[table]})


def reported_accuracy(kind: str, name: str) -> Reported:
    """Top-1 accuracy of a `zeroshot` or `linear_probe` benchmark, by its name in the configuration."""
    numbers = _PAPER['accuracy'].get(f'{kind}.{name}')
    return _llm2clip({'3': {model: {f'{kind}_top1': top1} for model, top1 in numbers.items()}} if numbers else {})


def reported_cra(name: Optional[str]) -> Reported:
    """`CRA`, caption retrieval accuracy, on pairs of that name."""
    return _llm2clip({'A1': {model: {'CRA': cra} for model, cra in _PAPER['cra'].items()}} if name == 'coco' else {})


def reported_average(benchmarks: Sequence[str], results: Mapping[str, Any], ablations: Sequence[str] = ()) -> Reported:
    """Means over benchmarks, as `mean` of accuracies and as recall@1 of each direction.

    Args:
        benchmarks: `zeroshot.food101` with the name that it has there, all of one kind.
        results: `results.json`.
        ablations: Tables that are wanted besides 1 and 2.
    """
    kind, names = benchmarks[0].partition('.')[0], [benchmark.partition('.')[2] for benchmark in benchmarks]
    proclip = _PAPER['proclip']
    if kind == 'zeroshot' and sorted(names) == sorted(proclip['sets']):
        return Reported({model: {'mean': mean} for model, mean in proclip['means'].items()}, f'{_PROCLIP}, table 2')
    if kind != 'retrieval':
        return Reported({})
    sets = [results[kind][name]['benchmark'] for name in names]
    if sets == ['xm3600'] * _LANGUAGES:
        return _llm2clip({'2': {model: _recalls(cell) for model, cell in _PAPER['xm3600'].items()}})
    means = {}
    for table in ('1', '2', *ablations):
        if all(name in RECALLS[table] for name in sets):
            rows = [RECALLS[table][name] for name in sets]
            means[table] = {model: {metric: sum(of_set[model][metric] for of_set in rows) / len(rows)
                                    for metric in numbers} for model, numbers in rows[0].items()}
    return _llm2clip(means)
