# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The report: self-contained, with tables, curves and both picture grids."""

import json
from pathlib import Path

import torch
from parts import make_samples

from llm2clip.callbacks.jsonl_logger import read_metrics
from llm2clip.config import RetrievalConfig
from llm2clip.evaluate import Features, read_gallery
from llm2clip.report import collect_seconds, render_report


def test_gallery_marks_what_is_right(image_dataset: Path) -> None:
    config = RetrievalConfig(images=str(image_dataset), embeddings='', caption_keys=['long'])
    features = Features(torch.eye(64), torch.eye(64)[:, None], torch.arange(64)[:, None])
    gallery = read_gallery(features, config, queries=4, top=3)
    by_text = {s.captions['long']: s.image for s in make_samples(64)}
    for row in gallery['captions']:
        assert row['results'][0] == (by_text[row['query']], True) and not row['results'][1][1]
    for row in gallery['images']:
        text, right = row['results'][0]
        assert right and by_text[text] == row['query'] and len(row['results']) == 3


def test_report_is_one_file_with_everything(image_dataset: Path, tmp_path: Path) -> None:
    step = tmp_path / 'stage2'
    step.mkdir()
    (step / 'seconds.json').write_text('{"seconds": 12.3}')
    (step / 'config.yaml').write_text('seed: 1 # <b>\n')
    lines = [{'step': i, 'loss/train/total': 3.0 - i, 'lr-AdamW/group0': 0.1} for i in range(3)]
    (step / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "loss')
    config = RetrievalConfig(images=str(image_dataset), embeddings='', caption_keys=['short'])
    features = Features(torch.eye(64), torch.eye(64)[:, None], torch.arange(64)[:, None])
    steps = {'stage2': str(step), 'missing': str(tmp_path / 'no')}
    results = {'seconds': collect_seconds(steps), 'stage1': {'cra': 61.5}, 'stage2': {'set': features.recall()}}
    page = render_report('Title', results, read_gallery(features, config), steps)
    assert results['seconds'] == {'stage2': 12.3}
    for text in ('<svg', 'data:image/png;base64', '61.5', 'class="right"', '&lt;b&gt;', '100.0'):
        assert text in page
    assert 'src="http' not in page and '<script' not in page and 'href=' not in page.replace('xlink:href="#', '')


def test_metrics_keep_the_last_value_of_a_repeated_step(tmp_path: Path) -> None:
    path = tmp_path / 'm.jsonl'
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"st\n{"step": 2, "a": 3, "b": 4}\n')
    assert read_metrics(path) == {'a': {1: 1, 2: 3}, 'b': {2: 4}}
    assert read_metrics(tmp_path / 'none') == {}
