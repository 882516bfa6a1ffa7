# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The report: self-contained, with tables, curves and pictures."""

import json
from pathlib import Path

import pytest
from recipes_in_process import run_recipe

from llm2clip.config import ConfigError
from llm2clip.evaluation.report import collect_seconds, render_report
from llm2clip.training.callbacks.jsonl_logger import read_metrics


def test_report_is_one_file_with_everything(image_dataset: Path, tmp_path: Path) -> None:
    step = tmp_path / 'stage2'
    step.mkdir()
    (step / 'seconds.json').write_text('{"seconds": 12.3}')
    (step / 'config.yaml').write_text('seed: 1 # <b>\n')
    lines = [{'step': i, 'loss/train/total': 3.0 - i, 'lr-AdamW/group0': 0.1} for i in range(3)]
    (step / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "loss')
    steps = {'stage2': str(step), 'missing': str(tmp_path / 'no')}
    values = {'n_images': 64, 'n_texts': 64, 'chance@10': 15.6, 'intervals': {'image_retrieval_recall@1': (20.0, 40.5)}}
    for way in ('image', 'text'):
        values.update({f'{way}_retrieval_recall@{k}': 30.25 for k in (1, 5, 10)}, **{f'{way}_retrieval_mean_rank': 7.5})
    results = {'cra': {'untuned': 61.5}, 'retrieval': {'set': {'benchmark': 'coco', 'models': {'<m>': values}}}}
    row = {'kind': 'worst', 'rank': 1234, 'query': 'a <caption>', 'results': [('data:image/jpeg;base64,xyz', True)]}
    gallery = {'model': '<m>', 'texts': [row],
               'images': [{**row, 'query': 'data:image/jpeg;base64,abc', 'results': [('found', False)]}]}
    page = render_report('Title', results, {'set': gallery}, steps)
    assert collect_seconds(steps) == {'stage2': 12.3}
    for text in ('<svg', 'base64,xyz', '61.5', 'class="right"', '&lt;b&gt;', '30.2 [20.0,\xa040.5]',
                 'a &lt;caption&gt;', 'worst, rank 1,234', '&lt;m&gt;', '56.3', '(paper)'):
        assert text in page
    assert 'src="http' not in page and '<script' not in page and 'href=' not in page.replace('xlink:href="#', '')


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, out = tmp_path / 'evaluate', tmp_path / 'report'

    def refused(message: str, *args: str) -> None:
        with pytest.raises(ConfigError, match=message):
            run_recipe(monkeypatch, 'report', f'results={results}', f'out={out}', 'steps={}', *args)
        assert not out.exists()

    expected = 'results: expected the folder of an evaluation, with results.json and gallery.json; got '
    refused(f'{expected}{results} .there is no such folder')
    results.mkdir()
    refused(f'{expected}{results} .results.json: .*No such file')
    (results / 'results.json').write_text('{"retr')
    refused(f'{expected}{results} .results.json: Unterminated string')
    (results / 'results.json').write_text('{}')
    refused(f'{expected}{results} .gallery.json: .*No such file')
    (results / 'gallery.json').write_text('{"coco": {}, "docci": {}}')
    refused('galleries: .*evaluate has pictures of coco, docci, not of urban1k', 'galleries=[urban1k]')
    refused('steps.stage1: there is no folder nowhere', 'steps={stage1: nowhere}')


def test_metrics_keep_the_last_value_of_a_repeated_step(tmp_path: Path) -> None:
    path = tmp_path / 'm.jsonl'
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"st\n{"step": 2, "a": 3, "b": 4}\n')
    assert read_metrics(path) == {'a': {1: 1, 2: 3}, 'b': {2: 4}}
    assert read_metrics(tmp_path / 'none') == {}
