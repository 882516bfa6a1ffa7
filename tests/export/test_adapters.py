# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports in sentence-transformers, and through it in CLIP_benchmark and MTEB: features and metrics are ours."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from datasets import Dataset
from parts import COLORS, SHAPES, make_samples, picture
from PIL import Image
from recipes_in_process import example_of_the_page
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from trained import Trained, trained

from llm2clip.evaluation.classifiers import class_features, zeroshot_metrics
from llm2clip.export.check import pictures, training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.metrics.retrieval import rank_both_ways

N = 30
TEXTS = [f'{i} {COLORS[i % 10]} {SHAPES[i % 4]}' for i in range(N)]
CLASSES = ['a square', 'some circles', 'the cross']


def _tasks() -> list[Any]:
    """Tasks of MTEB, each of another kind, with our data in place of theirs."""
    import mteb

    images = [Image.open(io.BytesIO(picture(i))) for i in range(N)]
    retrieval, zeroshot = mteb.get_tasks(['Flickr30kT2IRetrieval', 'CIFAR10ZeroShot'])
    ids = [str(i) for i in range(N)]
    retrieval.dataset = {'default': {'test': {
        'queries': Dataset.from_dict({'id': ids, 'text': TEXTS}),
        'corpus': Dataset.from_dict({'id': ids, 'image': images}),
        'relevant_docs': {i: {i: 1} for i in ids}, 'top_ranked': None}}}
    zeroshot.dataset = {'test': Dataset.from_dict(
        {zeroshot.input_column_name: images, zeroshot.label_column_name: [i % 3 for i in range(N)]})}
    zeroshot.get_candidate_labels = lambda: CLASSES
    retrieval.data_loaded = zeroshot.data_loaded = True
    return [retrieval, zeroshot]


@pytest.fixture
def of_run(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    of_run = trained('timm:test_vit', [teacher_folder])
    export_folder(*of_run, tmp_path / 'runs/export/llm2clip')
    monkeypatch.chdir(tmp_path)
    return of_run


@torch.no_grad()
def _features(of_run: Trained, images: list[bytes], *texts: list[str]) -> list[torch.Tensor]:
    preprocessing = of_run.model.vision_encoder.preprocessing
    pixels = torch.stack([training_pixels(data, preprocessing=preprocessing) for data in images])
    return [of_run.model.get_image_features(pixels),
            *(of_run.model.get_text_features(of_run.vectors(part)) for part in texts)]


def test_sentence_transformers_encodes_images_and_texts(of_run: Trained) -> None:
    given, names = list(pictures(64).values()), {}
    for name, data in zip(('dog.jpg', 'cat.png'), given):
        Path(name).write_bytes(data)
    exec(example_of_the_page("model.encode(['dog.jpg', 'cat.png'])"), names)
    model, texts = names['model'], ['a', *TEXTS, ' a  dog </s>' + 40 * ' and another', 'no_file.jpg', '犬 🐶']
    images, dogs, captions = _features(of_run, given, ['a photo of a dog', 'a photo of a cat'], texts)
    for found, expected in (
            (names['images'], images[:2]), (names['texts'], dogs), (names['similarities'], images[:2] @ dogs.T),
            (model.encode([Image.open(io.BytesIO(data)) for data in given], batch_size=2), images),
            (model.encode(texts, batch_size=4), captions), (model.encode(texts, truncate_dim=8), captions[:, :8]),
            (model.encode([{'image': 'cat.png', 'text': text} for text in texts]), normalize(images[1] + captions)),
            (pickle.loads(pickle.dumps(model)).encode(texts), captions)):  # as for `device=[…]`
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)
    assert model.get_embedding_dimension() == images.shape[1] and model.modalities[:2] == ['text', 'image']
    Path('damaged.png').write_bytes(given[0][:99])
    for wrong, message in (([{'image': 'no_file.jpg'}], 'no_file.jpg: expected a readable image'),
                           (['damaged.png'], 'damaged.png: expected'), (['a', 'dog.jpg'], 'each modality')):
        with pytest.raises(ValueError, match=message):
            model.encode(wrong)
    model.half().save('again')  # no longer the weights that were exported
    shutil.rmtree('runs')
    again = SentenceTransformer('again', device='cpu')
    torch.testing.assert_close(torch.as_tensor(again.encode(texts)), captions, rtol=0, atol=2e-3)
    shutil.rmtree('again/teacher')
    with pytest.raises(ValueError, match='again/teacher/.*: is missing or not the file'):
        SentenceTransformer('again', device='cpu').encode(texts)


def test_clip_benchmark_agrees_with_our_metrics(of_run: Trained) -> None:
    encoded = [picture(i) for i in range(24)]
    captions = [list(sample.captions.values()) for sample in make_samples(24, images=False)]
    names: dict[str, Any] = {}
    exec(example_of_the_page('def load_llm2clip('), names)
    model, transform, tokenizer = names['load_llm2clip']('', 'runs/export/llm2clip', None, 'cpu')
    pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in encoded])
    images, texts = _features(of_run, encoded, [text for own in captions for text in own])

    batches = [(pixels[i:i + 8], captions[i:i + 8]) for i in range(0, 24, 8)]
    theirs = zeroshot_retrieval.evaluate(model, batches, tokenizer, 'cpu', amp=False, recall_k_list=[1, 5, 10])
    ours = rank_both_ways(images, texts, torch.arange(24).repeat_interleave(2)).recalls()
    assert len(theirs) == 6 and 0 < theirs['image_retrieval_recall@10'] < 1
    for name, value in theirs.items():
        assert 100 * value == pytest.approx(ours[name], abs=1e-4), name


@pytest.mark.long
def test_mteb_agrees_with_our_metrics(of_run: Trained) -> None:
    names: dict[str, Any] = {'tasks': _tasks()}
    exec(example_of_the_page('import mteb'), names)
    images, texts, prompts = _features(of_run, [picture(i) for i in range(N)], TEXTS, CLASSES)
    recalls = rank_both_ways(images, texts, torch.arange(N)).recalls()
    theirs = {result.task_name: result.scores['test'][0] for result in names['results'].task_results}
    for k in (1, 5, 10):
        assert 100 * theirs['Flickr30kT2IRetrieval'][f'recall_at_{k}'] == pytest.approx(
            recalls[f'image_retrieval_recall@{k}'], abs=1e-2)
    accuracy, _ = zeroshot_metrics(images, torch.arange(N) % 3, class_features(prompts, CLASSES), CLASSES, resamples=0)
    assert 100 * theirs['CIFAR10ZeroShot']['accuracy'] == pytest.approx(accuracy.zeroshot_top1, abs=1e-3)
    assert names['scores'].keys() == theirs.keys() and all(0 < score < 1 for score in names['scores'].values())
