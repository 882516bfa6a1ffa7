# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The exported folder: the same numbers, loaded by transformers, as the README says."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import make_samples, picture
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoImageProcessor, AutoModel

import llm2clip
from llm2clip.config import AdapterConfig, ModelConfig, VisionConfig
from llm2clip.data.transforms import eval_transform
from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.teacher import load_teacher
from llm2clip.models.text_encoder import encode_texts

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(VisionConfig('test_efficientnet', image_size=32, checkpoint='elsewhere.pth'),
                     AdapterConfig(depth=1), embed_dim=16)


@pytest.fixture(scope='module')
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM2CLIP, Path]:
    torch.manual_seed(3)
    model = LLM2CLIP(CONFIG, 32, load_weights=False).eval()
    out = tmp_path_factory.mktemp('export') / 'model'
    export_folder(model, CONFIG, {'llm_embed_dim': 32, 'teacher': {'pooling': 'mean'}}, teacher_folder, out)
    return model, out


def test_loaded_model_gives_the_same_features(exported: tuple[LLM2CLIP, Path], teacher_folder: Path) -> None:
    model, out = exported
    loaded = AutoModel.from_pretrained(out)
    assert isinstance(loaded, llm2clip.LLM2CLIPModel) and not loaded.training
    pixels, texts = torch.randn(3, 3, 32, 32), [s.captions['long'] for s in make_samples(5)]
    embedding = encode_texts(*load_teacher(teacher_folder), texts)
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_image_features(pixels), model.get_image_features(pixels))
        expected = model.get_text_features(embedding)
        torch.testing.assert_close(loaded.get_text_features(text_embedding=embedding), expected)
        torch.testing.assert_close(loaded.get_text_features(texts), expected)
        logits = loaded(pixels, embedding)['logits_per_image']
    torch.testing.assert_close(logits, model.logit_scale.exp() * model.get_image_features(pixels) @ expected.T)
    with pytest.raises(ValueError, match='either texts or text_embedding'):
        loaded.get_text_features()


def test_image_processor_equals_the_evaluation_transform(exported: tuple[LLM2CLIP, Path]) -> None:
    model, out = exported
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.open(io.BytesIO(picture(1)))):
        expected = eval_transform(model.vision_encoder.preprocessing)(pil_to_tensor(image))
        found = AutoImageProcessor.from_pretrained(out)(image, return_tensors='pt')['pixel_values'][0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_readme_snippet_runs(
    exported: tuple[LLM2CLIP, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r'runs this block -->\n```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert code is not None and code[1].count('\n') <= 10
    monkeypatch.chdir(tmp_path)
    Path('picture.png').write_bytes(picture(0))
    shutil.copytree(exported[1], 'runs/quickstart/export/llm2clip')
    exec(code[1], {})
    assert 'red heart' in capsys.readouterr().out
