# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The paper's numbers: copied rightly, as far as its own averages tell, and found under names that exist."""

from typing import get_args

import pytest
import yaml
from recipes_in_process import ROOT

from llm2clip.config.ranges import PaperAblation
from llm2clip.evaluation.paper import RECALLS, reported_accuracy, reported_average, reported_cra, reported_recalls
from llm2clip.registry import RETRIEVAL_SETS

FIVE = ['flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci']
# What the paper has in the last columns of these tables, image→text and text→image.
AVERAGES = {
    '1': '69.5/57.1 86.1/81.9 74.0/65.6 86.1/82.7 71.4/61.3 87.8/84.6 78.4/71.5 87.3/84.7 89.3/85.8 90.4/86.3 '
         '74.4/62.2 86.6/83.3 91.1/84.5 79.3/72.3 88.0/84.8 91.0/86.8 81.8/75.8 91.2/86.4',
    'A3': '74.4/72.0 74.5/72.3 82.7/80.4 84.1/82.2 83.9/82.1 83.5/81.9 80.5/80.0',
    'A4': '83.9/80.7 66.5/62.5 85.4/82.5 83.9/82.1 85.9/83.3',
    'A5': '80.4/77.9 59.2/57.7 70.1/67.0 79.7/77.2 80.0/77.5 80.0/77.3 74.1/71.3',
    'A6': '74.4/72.0 74.5/72.3 78.9/78.2 81.4/80.2 81.4/79.9 65.0/63.6 73.6/71.0 74.0/71.7 83.6/80.1 78.2/77.1 '
          '75.6/73.0 80.4/77.9 83.4/80.9 83.5/80.5 84.8/81.0 66.5/62.5',
    'A7': '78.3/75.5 79.2/76.7 80.1/76.8 80.4/77.9 80.5/77.7 80.2/77.3 80.5/77.3',
    'A8': '74.4/72.0 74.5/72.3 83.9/82.1 74.4/72.0 83.6/81.8 74.0/72.1 83.7/81.4 74.8/71.3 83.8/82.3 84.7/82.8',
}
# Rows whose average is not that of their numbers.
OTHERWISE = {'CLIP L/14-336 + LLM2CLIP 60M', 'EVA02 L/14-336 + LLM2CLIP 15M', 'EVA02 L/14-336 + LLM2CLIP 60M'}


def test_the_mean_over_five_sets_is_the_average_of_the_paper() -> None:
    ablations = [table for table in AVERAGES if table != '1']
    assert ablations == list(get_args(PaperAblation)) and {*RECALLS} == {'1', '2', *ablations}
    results = {'retrieval': {f'my {name}': {'benchmark': name} for name in FIVE}}
    reported = reported_average([f'retrieval.my {name}' for name in FIVE], results, ablations)
    averages = [cell for cells in AVERAGES.values() for cell in cells.split()]
    assert len(reported.rows) == len(averages) == 18 + 7 + 5 + 7 + 16 + 7 + 10
    assert reported.source == 'arXiv 2411.04997 v6, tables 1, A3, A4, A5, A6, A7, A8'
    for (model, means), cell in zip(reported.rows.items(), averages):
        found = [means[f'{way}_retrieval_recall@1'] for way in ('text', 'image')]
        # Some of the last digits are cut off, and not rounded.
        right = found == pytest.approx([*map(float, cell.split('/'))], abs=0.08)
        assert right == (model not in OTHERWISE), f'{model}: {found}, the paper has {cell}'
    # Without them, the first table alone.
    assert len(reported_average([f'retrieval.my {name}' for name in FIVE], results).rows) == 18


def test_what_is_reported_has_a_name_that_exists() -> None:
    for rows in RECALLS.values():
        assert {*rows} <= {*RETRIEVAL_SETS}
        # Each model has a number on each set of its table.
        assert len({tuple(models) for models in rows.values()}) == 1
    named = [(kind, name) for path in ROOT.glob('yamls/eval/sets/imagenet*.yaml')
             for kind, sets in yaml.safe_load(path.read_text()).items() for name in sets]
    reported = {name: reported_accuracy(kind, name).rows for kind, name in named}
    assert sorted(name for name, rows in reported.items() if rows) == [
        'imagenet', 'imagenet_80_prompts', 'imagenet_one_prompt']
    assert reported['imagenet']['CLIP L/14-336 + LLM2CLIP'] == {'linear_probe_top1': 85.2}
    assert reported_accuracy('zeroshot', 'imagenet') == ({}, '')


def test_means_of_other_sets() -> None:
    path = ROOT / 'yamls/eval/sets/xm3600.yaml'
    content = yaml.safe_load(path.read_text())
    benchmarks = content['averages']['xm3600']
    assert benchmarks == [f'retrieval.{name}' for name in content['retrieval']]
    sets = content['retrieval'].items()
    results = {'retrieval': {name: {'benchmark': entry['source']['name']} for name, entry in sets}}
    reported = reported_average(benchmarks, results)
    assert reported.rows['SigLIP2'] == {'text_retrieval_recall@1': 59.7, 'image_retrieval_recall@1': 48.2}
    assert reported.source == 'arXiv 2411.04997 v6, table 2'
    assert reported_average(benchmarks[1:], results) == ({}, '')
    results = {'retrieval': {name: {'benchmark': name} for name in ('flickr_cn', 'coco_cn', 'flickr30k')}}
    chinese = reported_average(['retrieval.flickr_cn', 'retrieval.coco_cn'], results)
    assert chinese.rows['CN-CLIP']['text_retrieval_recall@1'] == pytest.approx((80.2 + 63.4) / 2)
    assert not reported_average(['retrieval.flickr_cn', 'retrieval.flickr30k'], results).rows
    assert not reported_average(['linear_probe.imagenet'], results).rows
    assert reported_recalls('coco', ['A5']).source == 'arXiv 2411.04997 v6, tables 1, A5'
    assert reported_recalls('mds') == ({}, '') and reported_cra(None) == ({}, '')
    assert reported_cra('coco').rows['CLIP L/14'] == {'CRA': 25.2}
