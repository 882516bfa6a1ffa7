# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports in a Python that has no llm2clip: by remote code, in transformers and sentence-transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts import make_samples
from safetensors.torch import load_file, save_file
from trained import SMALL, Trained, trained

from llm2clip.config import SentenceTransformersTeacherConfig, TowerConfig
from llm2clip.export.check import pictures, training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.teacher.sources import SentenceTransformerModel

pytestmark = pytest.mark.long

BESIDE = [TowerConfig('test_efficientnet', checkpoint='/elsewhere/second.pth', feature_levels=1),
          TowerConfig('a folder', architecture={'model_type': 'clip_vision_model', **SMALL, 'image_size': 64})]
TEXTS = [text for sample in make_samples(5) for text in sample.captions.values()]


@pytest.fixture(scope='module')
def models(teacher_folder: Path, causal_teacher: Path, weighted_teacher: Path, embedder: Path) -> dict[str, Trained]:
    sentences = SentenceTransformerModel(SentenceTransformersTeacherConfig(str(embedder), 'query'))
    return {'clip': trained('clip_vision_model', [teacher_folder, causal_teacher, sentences], 'linear'),
            'siglip': trained('siglip_vision_model', [weighted_teacher], 'identity', logit_bias=-10.0),
            'timm': trained('timm:test_vit', [causal_teacher], feature_levels=2, beside=BESIDE, heads=2)}


@pytest.fixture(scope='module')
def found(models: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp('exports')
    given = {}
    for name, (model, config, record, teachers) in models.items():
        export_folder(model, config, record, teachers, folder / name)
        given[f'{name}.pixels'], given[f'{name}.vectors'] = models[name].pixels(), models[name].vectors(TEXTS)
    export_sentence_transformers(models['siglip'].teachers[0], folder / 'sentences')
    save_file(given, folder / 'given.safetensors')
    (folder / 'pictures').mkdir()
    for i, data in enumerate(pictures(32).values()):
        (folder / 'pictures' / f'{i}').write_bytes(data)
    # transformers keeps the code that it has run by the folder's name.
    (folder / 'with_timm').symlink_to(folder / 'timm')
    environment = {**os.environ, 'HF_HOME': str(folder / 'cache'), 'HF_HUB_OFFLINE': '1'}
    (folder / 'texts.json').write_text(json.dumps(TEXTS))
    script = Path(__file__).with_name('load_without_package.py')
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True, cwd=folder)
    return load_file(folder / 'found.safetensors')


@pytest.mark.parametrize('name', ['clip', 'siglip', 'with_timm'])
@torch.no_grad()
def test_remote_code_gives_the_features_of_the_checkpoint(
    name: str, models: dict[str, Trained], found: dict[str, torch.Tensor]
) -> None:
    trained_model = models[name.removeprefix('with_')]
    model, vectors = trained_model.model, trained_model.vectors(TEXTS)
    images, texts = model.get_image_features(trained_model.pixels()), model.get_text_features(vectors)
    assert images.std() > 0.01 and texts.std(0).mean() > 0.01
    preprocessing = model.vision_encoder.preprocessing
    of_pictures = model.get_image_features(
        torch.stack([training_pixels(data, preprocessing=preprocessing) for data in pictures(32).values()]))
    for kind, expected in (('images', images), ('pictures', of_pictures), ('sentence_images', of_pictures),
                           ('texts', texts), ('sentences', texts), ('vectors', texts)):
        tolerance = 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(found[f'{name}.{kind}'], expected, rtol=0, atol=tolerance, msg=kind)
    logits = model.logit_scale.exp() * images @ texts.T + (model.logit_bias or 0)
    torch.testing.assert_close(found[f'{name}.logits'], logits, rtol=1e-4, atol=1e-4)


def test_processor_pipeline_and_sentence_transformers(
    models: dict[str, Trained], found: dict[str, torch.Tensor]
) -> None:
    torch.testing.assert_close(found['processor.logits'], found['given.logits'], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found['pipeline.scores'], found['given.logits'].softmax(-1), rtol=1e-4, atol=1e-4)
    assert found['pipeline.scores'].std() > 1e-3
    for name in ('sentences', 'sentences_again'):
        torch.testing.assert_close(found[name], models['siglip'].vectors(TEXTS), rtol=1e-4, atol=1e-4)
