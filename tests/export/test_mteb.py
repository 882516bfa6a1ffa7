# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The README's adapter for MTEB: on the same images and texts, its numbers are those of our own metrics."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from parts import COLORS, SHAPES, picture
from PIL import Image
from trained import trained

from llm2clip.evaluation.classification import class_features, zeroshot_metrics
from llm2clip.evaluation.composition import right_examples, similarities
from llm2clip.evaluation.sets.files import Example
from llm2clip.export.check import training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.metrics.retrieval import rank_both_ways

ROOT = Path(__file__).parents[2]
N = 30
TEXTS = [f'{i} {COLORS[i % 10]} {SHAPES[i % 4]}' for i in range(N)]
OTHERS = [f'{i} {SHAPES[i % 4]} {COLORS[i % 10]}' for i in range(N)]
CLASSES = ['a square', 'some circles', 'the cross']


def _tasks() -> list[Any]:
    """Tasks of MTEB, each of another kind, with our data in place of theirs."""
    import mteb

    images = [Image.open(io.BytesIO(picture(i))) for i in range(N)]
    retrieval, composition, zeroshot = mteb.get_tasks(['Flickr30kT2IRetrieval', 'SugarCrepe', 'CIFAR10ZeroShot'])
    ids = [str(i) for i in range(N)]
    retrieval.dataset = {'default': {'test': {
        'queries': Dataset.from_dict({'id': ids, 'text': TEXTS}),
        'corpus': Dataset.from_dict({'id': ids, 'image': images}),
        'relevant_docs': {i: {i: 1} for i in ids}, 'top_ranked': None}}}
    composition.dataset = {'test': Dataset.from_dict(
        {'images': images, 'caption': TEXTS, 'negative_caption': OTHERS})}
    zeroshot.dataset = {'test': Dataset.from_dict(
        {zeroshot.input_column_name: images, zeroshot.label_column_name: [i % 3 for i in range(N)]})}
    zeroshot.get_candidate_labels = lambda: CLASSES
    for task in (retrieval, composition, zeroshot):
        task.data_loaded = True
    return [retrieval, composition, zeroshot]


@pytest.mark.long
def test_the_readme_block_agrees_with_our_metrics(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = trained('timm:test_vit', [teacher_folder])
    shutil.rmtree(tmp_path, ignore_errors=True)
    export_folder(*of_run, tmp_path / 'runs/quickstart/export/llm2clip')
    monkeypatch.chdir(tmp_path)
    code = re.search(r'test_mteb.py runs this block -->\n```python\n(.*?)```',
                     (ROOT / 'recipes/README.md').read_text(), re.S)
    assert code is not None
    names: dict[str, Any] = {'tasks': _tasks()}
    exec(code[1], names)

    with torch.no_grad():
        texts, others, prompts = (of_run.model.get_text_features(of_run.vectors(part))
                                  for part in (TEXTS, OTHERS, CLASSES))
        preprocessing = of_run.model.vision_encoder.preprocessing
        images = of_run.model.get_image_features(
            torch.stack([training_pixels(picture(i), preprocessing=preprocessing) for i in range(N)]))
    recalls = rank_both_ways(images, texts, torch.arange(N)).recalls()
    theirs = {result.task_name: result.scores['test'][0] for result in names['results'].task_results}
    for k in (1, 5, 10):
        assert 100 * theirs['Flickr30kT2IRetrieval'][f'recall_at_{k}'] == pytest.approx(
            recalls[f'image_retrieval_recall@{k}'], abs=1e-2)
    right = right_examples(similarities(images, torch.cat([texts, others]), [Example((i,), (i, N + i))
                                                                             for i in range(N)]))['text']
    assert theirs['SugarCrepe']['text_acc'] == pytest.approx(right.float().mean().item()) and 0 < right.sum() < N
    accuracy, _ = zeroshot_metrics(images, torch.arange(N) % 3, class_features(prompts, CLASSES), CLASSES, resamples=0)
    assert 100 * theirs['CIFAR10ZeroShot']['accuracy'] == pytest.approx(accuracy['zeroshot_top1'], abs=1e-3)
    assert names['scores'].keys() == theirs.keys() and all(0 < score < 1 for score in names['scores'].values())
