# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The paper's numbers: copied rightly, as far as its own averages tell, and found under names that exist."""

import pytest
import yaml
from recipes_in_process import ROOT

from llm2clip.config import RetrievalConfig
from llm2clip.evaluation.benchmarks import published_name
from llm2clip.evaluation.paper import reported_average, reported_recalls
from llm2clip.evaluation.scores import BenchmarkScores, Results
from llm2clip.registry import SOURCES

FIVE = ['flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci']
# What the paper has in the last columns of table 1, image→text and text→image.
AVERAGES = ('69.5/57.1 86.1/81.9 74.0/65.6 86.1/82.7 71.4/61.3 87.8/84.6 78.4/71.5 87.3/84.7 89.3/85.8 90.4/86.3 '
            '74.4/62.2 86.6/83.3 91.1/84.5 79.3/72.3 88.0/84.8 91.0/86.8 81.8/75.8 91.2/86.4')
# Rows whose average is not that of their numbers.
OTHERWISE = {'CLIP L/14-336 + LLM2CLIP 60M', 'EVA02 L/14-336 + LLM2CLIP 15M', 'EVA02 L/14-336 + LLM2CLIP 60M'}


def _results(sets: dict[str, str]) -> Results:
    """Of no models, on benchmarks and the names of their sets."""
    return Results(retrieval={name: BenchmarkScores(benchmark=set_name, models={}) for name, set_name in sets.items()})


def test_the_mean_over_five_sets_is_the_average_of_the_paper() -> None:
    results = _results({f'my {name}': name for name in FIVE})
    reported = reported_average([f'retrieval.my {name}' for name in FIVE], results)
    assert reported.source == 'arXiv 2411.04997 v6, table 1'
    for (model, means), cell in zip(reported.rows.items(), AVERAGES.split(), strict=True):
        found = [means[f'{way}_retrieval_recall@1'] for way in ('text', 'image')]
        # Some of the last digits are cut off, and not rounded.
        right = found == pytest.approx([*map(float, cell.split('/'))], abs=0.08)
        assert right == (model not in OTHERWISE), f'{model}: {found}, the paper has {cell}'


def test_means_of_other_sets() -> None:
    assert published_name('coco', RetrievalConfig('d', merge_equal_texts=True)) == ''
    content = yaml.safe_load((ROOT / 'yamls/eval/sets/xm3600.yaml').read_text())
    benchmarks = content['averages']['xm3600']
    sets = content['retrieval'].items()
    results = _results({name: published_name(name, RetrievalConfig(**entry)) for name, entry in sets})
    reported = reported_average(benchmarks, results)
    assert reported.rows['SigLIP2'] == {'text_retrieval_recall@1': 59.7, 'image_retrieval_recall@1': 48.2}
    assert reported.source == 'arXiv 2411.04997 v6, table 2'
    assert reported_average(benchmarks[1:], results) == ({}, '')
    assert {'flickr_cn', 'coco_cn', 'xm3600', *FIVE} <= {*SOURCES} and reported_recalls(['mine']) == ({}, '')
