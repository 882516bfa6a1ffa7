# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers that papers report (`paper.yaml`), by the benchmarks and averages that they belong to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import yaml

from llm2clip.evaluation.scores import Results, split_benchmark

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


def reported_recalls(set_name: str) -> Reported:
    """Return reported recall@1 of both directions on a set, by the name of its source, such as `coco`."""
    for table, (key, columns) in _COLUMNS.items():
        if set_name in columns:
            column = columns.index(set_name)
            rows = {model: _recalls(cells.split()[column]) for model, cells in _PAPER[key].items()}
            return Reported(rows, f'{_LLM2CLIP}, table {table}')
    return Reported({})


def reported_accuracies(kind: str, name: str) -> Reported:
    """Return reported top-1 accuracies on a classification benchmark."""
    accuracies = _PAPER['accuracy'].get(f'{kind}.{name}', {})
    rows = {model: {f'{kind}_top1': value} for model, value in accuracies.items()}
    return Reported(rows, f'{_LLM2CLIP}, table 3')


def reported_cra(set_name: Optional[str]) -> Reported:
    """Return the reported caption retrieval accuracy, `CRA`, on a dataset."""
    if set_name != 'coco':
        return Reported({})
    rows = {model: {'CRA': value} for model, value in _PAPER['cra'].items()}
    return Reported(rows, f'{_LLM2CLIP}, table A1')


def reported_average(benchmarks: Sequence[str], results: Results) -> Reported:
    """Return reported means over benchmarks of one kind in `results`, such as `zeroshot.food101`.

    The metric is `mean` for accuracies and recall@1 of each direction for retrieval.
    """
    kind, _ = split_benchmark(benchmarks[0])
    names = [split_benchmark(benchmark)[1] for benchmark in benchmarks]
    proclip = _PAPER['proclip']
    if kind == 'zeroshot' and sorted(names) == sorted(proclip['sets']):
        rows = {model: {'mean': mean} for model, mean in proclip['means'].items()}
        return Reported(rows, f'{_PROCLIP}, table 2')
    if kind != 'retrieval':
        return Reported({})
    set_names = [results.retrieval[name].benchmark for name in names]
    if set_names == ['xm3600'] * 36:
        rows = {model: _recalls(cell) for model, cell in _PAPER['xm3600'].items()}
        return Reported(rows, f'{_LLM2CLIP}, table 2')
    for table, (_, columns) in _COLUMNS.items():
        if set(set_names) <= set(columns):
            return Reported(_mean_recalls(set_names), f'{_LLM2CLIP}, table {table}')
    return Reported({})


def _mean_recalls(set_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Model -> mean of the reported recalls over sets of one table."""
    per_set = [reported_recalls(name).rows for name in set_names]
    means = {}
    for model, metrics in per_set[0].items():
        means[model] = {metric: sum(recalls[model][metric] for recalls in per_set) / len(per_set)
                        for metric in metrics}
    return means
