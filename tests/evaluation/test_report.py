# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The report: self-contained, with tables, curves and pictures."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from recipes_in_process import run_recipe

from llm2clip.errors import ConfigError, FileError
from llm2clip.evaluation.report import curves, report_page
from llm2clip.evaluation.scores import Results
from llm2clip.evaluation.tables import plain

SCORES: dict[str, Any] = {'n_images': 64, 'n_texts': 1064, 'chance@10': 15.6,
                          'intervals': {'image_retrieval_recall@1': [20.0, 40.5]}}
for way in ('image', 'text'):
    SCORES |= {f'{way}_retrieval_recall@{k}': 30.25 for k in (1, 5, 10)} | {f'{way}_retrieval_mean_rank': 7.5}


def test_report_is_one_file_with_everything(tmp_path: Path) -> None:
    (step := tmp_path / 'stage2').mkdir()
    (step / 'seconds.json').write_text('{"seconds": 12.3}')
    (step / 'config.yaml').write_text('seed: 1 # <b>\n')
    lines = [{'step': i, 'loss/train/total': 3.0 - i, 'lr-AdamW/group0': 0.1} for i in range(3)]
    (step / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "loss')
    results = Results.model_validate({
        'cra': {'untuned': 61.5}, 'retrieval': {'set': {'benchmark': 'coco', 'models': {'<m>': SCORES}}}})
    row = {'kind': 'worst', 'rank': 1234, 'query': 'a <caption>',
           'results': [('found', False), ('data:image/jpeg;base64,xyz', True)]}
    gallery = {'model': '<m>', 'texts': [row], 'images': [{**row, 'query': 'data:image/x" onload="a', 'rank': 2}]}
    page, again = (report_page('A <title>', results, {'set': gallery, 'other': gallery},
                               {'stage2': str(step), 'missing': str(tmp_path / 'no')}) for _ in range(2))
    assert page == again
    for text in ('<svg', 'base64,xyz', 'class="right"', '&lt;b&gt;', 'R@1">30.2<small>[20.0, 40.5]</small></td>',
                 'A &lt;title&gt;', 'a &lt;caption&gt;', 'worst, rank 1,234', '&lt;m&gt;', '56.3', '(paper)',
                 '<td>12</td>', 'Written on 20', '&lt;m&gt; on set: 30.2 % of 1,064 texts'):
        assert text in page
    first, gallery_at, table_at = (page.index(text) for text in ('class="summary"', '<details class="gallery" open>',
                                                                 'Caption retrieval accuracy</h2>'))
    assert first < gallery_at < table_at
    # Each gallery can be closed, and a result that is not among the first stands after a gap.
    assert page.count('<details class="gallery">') == 1 and page.count('<span class="gap">… rank 1,234</span>') == 2
    assert page.count('class="gap"') == 2 and '" onload' not in page
    assert 'src="http' not in page and '<script' not in page and 'href=' not in page.replace('xlink:href="#', '')


def test_a_terminal_gets_aligned_tables_without_intervals() -> None:
    sets = {name: {'benchmark': '', 'models': {'m': SCORES}} for name in ('set', 'long_name')}
    title, *lines = plain(Results.model_validate({'retrieval': sets})).splitlines()
    assert title == 'Retrieval: m'
    assert [line.split()[0] for line in lines] == ['set', 'set', 'long_name']
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) < 120
    assert lines[1].split()[1:4] == ['64', '1,064', '30.2'] and '[' not in ''.join(lines)


def test_missing_results_galleries_and_steps_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [f'results={tmp_path}', f'out={tmp_path}/out', f'steps.a={tmp_path}']

    def refused(*more: str) -> str:
        with pytest.raises((ConfigError, FileError)) as error:
            run_recipe(monkeypatch, 'report', *args, *more)
        assert not (tmp_path / 'out').exists()
        return getattr(error.value, 'path', '') or error.value.key

    results, gallery = tmp_path / 'results.json', tmp_path / 'gallery.json'
    assert refused() == str(results)
    for wrong in ('{"retr', '{"cra": 1}'):
        results.write_text(wrong)
        assert refused() == str(results)
    results.write_text('{}')
    assert refused() == str(gallery)
    gallery.write_text('{"coco": {}}')
    assert refused('galleries=[urban1k]') == 'galleries' and refused('steps={stage1: nowhere}') == 'steps.stage1'


def test_metrics_have_names_in_words_and_a_curve_only_from_three_values_on() -> None:
    metrics = {'loss/train/total': {0: 3.0, 1: 2.0, 2: 1.0}, 'lr-AdamW/group1': {0: 0.1, 1: 0.2, 2: 0.3},
               'metrics/eval/retrieval_recall@10': {1: 20.0, 2: 30.0}}
    with mpl.rc_context({'svg.fonttype': 'none'}):
        pictures = curves(metrics)
        assert pictures.count('<svg') == 2 and '>training loss<' in pictures and '>parameter group 1<' in pictures
        assert 'retrieval' not in pictures
        metrics['metrics/eval/retrieval_recall@10'][3] = 40.0
        assert '>retrieval recall@10<' in curves(metrics)
        assert curves({'metrics/eval/x': {0: 1.0}}) == ''
