# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers that papers report (`paper.yaml`), by the benchmarks and averages that they belong to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import yaml

from llm2clip.evaluation.scores import Results

_LLM2CLIP = 'arXiv 2411.04997 v6'
_PAPER = yaml.safe_load(Path(__file__).with_name('paper.yaml').read_text('utf-8'))


class Reported(NamedTuple):
    """Numbers that a paper reports for a benchmark or an average."""

    rows: Mapping[str, Mapping[str, float]]
    """Model -> metric -> percent; empty if the paper reports none."""
    source: str = ''
    """Paper and table."""


def reported_recalls(set_names: Sequence[str]) -> Reported:
    """Return reported recall@1 of both directions, as means over sets of one table, such as `coco`."""
    for table in _PAPER['retrieval']:
        if {*set_names} <= {*table['sets']}:
            columns = [table['sets'].index(name) for name in set_names]
            rows = {model: _mean_recalls(cells, columns) for model, cells in table['models'].items()}
            return Reported(rows, table['source'])
    return Reported({})


def _mean_recalls(cells: str, columns: Sequence[int]) -> dict[str, float]:
    """Mean recall@1 of both directions over columns of a row of cells `image→text/text→image`."""
    recalls = np.array([cell.split('/') for cell in cells.split()], float)[columns]
    return dict(zip(('text_retrieval_recall@1', 'image_retrieval_recall@1'), recalls.mean(0).tolist()))


def reported_accuracies(kind: str, name: str) -> Reported:
    """Return reported top-1 accuracies on a classification benchmark."""
    accuracies = _PAPER['accuracy'].get(f'{kind}.{name}', {})
    rows = {model: {f'{kind}_top1': value} for model, value in accuracies.items()}
    return Reported(rows, f'{_LLM2CLIP}, table 3')


def reported_cra(set_name: Optional[str]) -> Reported:
    """Return the reported caption retrieval accuracy, `CRA`, on a dataset."""
    rows = {model: {'CRA': value} for model, value in _PAPER['cra'].get(set_name, {}).items()}
    return Reported(rows, f'{_LLM2CLIP}, table A1')


def reported_average(benchmarks: Sequence[str], results: Results) -> Reported:
    """Return reported means over benchmarks of one kind in `results`, such as `zeroshot.food101`.

    The metric is `mean` for accuracies and recall@1 of each direction for retrieval.
    """
    kinds, names = zip(*(benchmark.split('.', 1) for benchmark in benchmarks))
    if kinds[0] == 'retrieval':
        set_names = [results.retrieval[name].benchmark for name in names]
        if set_names != ['xm3600'] * 36:
            return reported_recalls(set_names)
        rows = {model: _mean_recalls(cell, [0]) for model, cell in _PAPER['xm3600'].items()}
        return Reported(rows, f'{_LLM2CLIP}, table 2')
    proclip = _PAPER['proclip']
    if kinds[0] == 'zeroshot' and sorted(names) == sorted(proclip['sets']):
        rows = {model: {'mean': mean} for model, mean in proclip['means'].items()}
        return Reported(rows, 'arXiv 2510.18795, table 2')
    return Reported({})
