# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The report: self-contained, with tables, curves and pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_in_process import run_recipe

from llm2clip.errors import ConfigError, FileError
from llm2clip.evaluation.report import report_page
from llm2clip.evaluation.scores import Results


def metrics_of(recall: float = 30.25) -> dict[str, Any]:
    """What `evaluate` writes of a model on a retrieval set of 64 images."""
    values: dict[str, Any] = {'n_images': 64, 'n_texts': 64, 'chance@10': 15.6,
                              'intervals': {'image_retrieval_recall@1': [20.0, 40.5]}}
    for way in ('image', 'text'):
        values.update({f'{way}_retrieval_recall@{k}': recall for k in (1, 5, 10)},
                      **{f'{way}_retrieval_mean_rank': 7.5})
    return values


def entry(*models: str, benchmark: str = 'mds') -> dict[str, Any]:
    return {'benchmark': benchmark, 'models': {model: metrics_of() for model in models}}


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The folder of a training of three steps in 12.3 seconds."""
    folder = tmp_path / 'stage2'
    folder.mkdir()
    (folder / 'seconds.json').write_text('{"seconds": 12.3}')
    (folder / 'config.yaml').write_text('seed: 1 # <b>\n')
    lines = [{'step': i, 'loss/train/total': 3.0 - i, 'lr-AdamW/group0': 0.1} for i in range(3)]
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "loss')
    return folder


def test_report_is_one_file_with_everything(step: Path, tmp_path: Path) -> None:
    results = Results.model_validate({'cra': {'untuned': 61.5}, 'retrieval': {'set': entry('<m>', benchmark='coco')}})
    row = {'kind': 'worst', 'rank': 1234, 'query': 'a <caption>', 'results': [('data:image/jpeg;base64,xyz', True)]}
    gallery = {'model': '<m>', 'texts': [row],
               'images': [{**row, 'query': 'data:image/jpeg;base64,abc', 'results': [('found', False)]}]}
    page, again = (report_page('A <title>', results, {'set': gallery},
                               {'stage2': str(step), 'missing': str(tmp_path / 'no')}) for _ in range(2))
    assert page == again
    for text in ('<svg', 'base64,xyz', 'class="right"', '&lt;b&gt;', '<td>30.2<small>[20.0, 40.5]</small></td>',
                 'A &lt;title&gt;', 'a &lt;caption&gt;', 'worst, rank 1,234', '&lt;m&gt;', '56.3', '(paper)',
                 '<td>12</td>'):
        assert text in page
    assert 'src="http' not in page and '<script' not in page and 'href=' not in page.replace('xlink:href="#', '')
    headings = page.count('<h2>')
    assert headings == page.count('</h2><p>') == 6  # below each, a sentence


def test_texts_of_a_gallery_are_escaped() -> None:
    row = {'kind': '"><script>', 'rank': 1, 'query': 'data:image/x" onload="a', 'results': []}
    page = report_page('t', Results(), {'set': {'model': 'm', 'texts': [], 'images': [row]}})
    assert '<script' not in page and '" onload' not in page


def test_missing_results_galleries_and_steps_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, out = tmp_path / 'evaluate', tmp_path / 'report'

    def refused(message: str, *args: str) -> None:
        with pytest.raises((ConfigError, FileError), match=message):
            run_recipe(monkeypatch, 'report', f'results={results}', f'out={out}', f'steps.a={tmp_path}', *args)
        assert not out.exists()

    refused(f'{results}/results.json: cannot be read .No such file')
    results.mkdir()
    (results / 'results.json').write_text('{"retr')
    refused(f'{results}/results.json: cannot be read .Unterminated string')
    (results / 'results.json').write_text('{"cra": 1}')
    refused(f'{results}/results.json: cannot be read .*expected the results that `evaluate` writes')
    (results / 'results.json').write_text('{}')
    refused(f'{results}/gallery.json: cannot be read .No such file')
    (results / 'gallery.json').write_text('{"coco": {}, "docci": {}}')
    refused('galleries: .*evaluate has pictures of coco, docci, not of urban1k', 'galleries=[urban1k]')
    refused('steps.stage1: there is no folder nowhere', 'steps={stage1: nowhere}')
