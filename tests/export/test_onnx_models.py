# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports for ONNX Runtime: features, batches of any size, the code of the model card, and what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from parts import text_encoder_from_config
from PIL import Image
from trained import Trained, trained

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.errors import ConfigError
from llm2clip.export.onnx_models import export_onnx
from llm2clip.teacher.llm import save_teacher
from llm2clip.teacher.sources import TeacherFolder


def features(of_run: Trained, folder: Path, **options: Any) -> np.ndarray:
    """Export, and run the tower on three images in batches of one and two."""
    export_onnx(of_run.model, of_run.config, of_run.record, folder, **options)
    session = InferenceSession(folder / 'model.onnx')
    pixels = of_run.pixels().numpy()
    return np.concatenate([session.run(None, {'pixel_values': part})[0] for part in (pixels[:1], pixels[1:])])


def assert_same(found: np.ndarray, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    assert F.cosine_similarity(torch.from_numpy(found), expected).min() > 0.9999 and expected.std() > 0.01


@pytest.mark.parametrize('vision', ['siglip_vision_model', 'vit', 'timm:test_efficientnet'])
@torch.no_grad()
def test_features_are_those_of_the_tower(vision: str, teacher_folder: Path, tmp_path: Path) -> None:
    of_run = trained(vision, [teacher_folder], 'linear' if vision == 'vit' else 'residual')
    of_run.model.to(memory_format=torch.channels_last)
    assert_same(features(of_run, tmp_path / 'out'), of_run.model.get_image_features(of_run.pixels()))
    vectors = torch.randn(5, 32)
    texts, = InferenceSession(tmp_path / 'out/adapter.onnx').run(None, {'text_embedding': vectors.numpy()})
    assert_same(texts, of_run.model.get_text_features(vectors))
    if vision == 'vit':
        pooled = features(of_run, tmp_path / 'pooled', projection=False)
        assert_same(pooled, of_run.model.vision_encoder(of_run.pixels()))
        assert not (tmp_path / 'pooled/adapter.onnx').exists()


@torch.no_grad()
@pytest.mark.parametrize(('vision', 'kind'), [  # torch 2.7 cannot express the mask of causal LLMs
    ('timm:test_vit', 'teacher_folder'),
    ('clip_vision_model', 'causal_teacher' if torch.__version__ >= '2.8' else 'weighted_teacher')])
def test_the_model_card_embeds_images_and_captions(
    vision: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    teacher: Path = request.getfixturevalue(kind)
    of_run = trained(vision, [teacher])
    export_onnx(of_run.model, of_run.config, of_run.record, tmp_path / 'out', teachers=[TeacherFolder(teacher)])
    monkeypatch.chdir(tmp_path / 'out')
    Image.new('RGB', (90, 70), 'red').save('picture.png')
    code = re.search(r'```python\n(.*?)```', Path('README.md').read_text(), re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace('on a sofa', 'on a sofa' + 40 * ' and a chair'), names)  # is cut if the teacher cuts it
    assert_same(names['text_embedding'], of_run.vectors(names['captions']))
    assert_same(names['text_features'], of_run.model.get_text_features(of_run.vectors(names['captions'])))
    assert_same(names['image_features'], of_run.model.get_image_features(names['pixels'].pixel_values))


def test_lora_beside_bfloat16_is_merged(llm_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = text_encoder_from_config(
        TextEncoderConfig(pretrained=str(llm_folder), dtype='bfloat16'), LoraConfig(r=4), 0.1)
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher')
    of_run = trained('timm:test_vit', [tmp_path / 'teacher'])
    export_onnx(of_run.model, of_run.config, of_run.record, tmp_path / 'out', teachers=[
        TeacherFolder(tmp_path / 'teacher')])
    nodes = onnx.load(tmp_path / 'out/text_encoder.onnx').graph.node
    products = sum(node.op_type in ('MatMul', 'Gemm') for node in nodes)
    # Seven projections and two products of attention in each of two layers, and in torch 2.7 one of RoPE.
    assert products in (9 * 2, 9 * 2 + 1)


def test_what_onnx_cannot_express_is_one_line(teacher_folder: Path, causal_teacher: Path, tmp_path: Path) -> None:
    of_run = trained('timm:test_vit', [teacher_folder])
    blocks: Any = of_run.model.vision_encoder.trunk.blocks
    blocks.register_forward_hook(lambda module, inputs, output: output * (2 if output.sum() > 0 else 1))
    two = [TeacherFolder(teacher_folder), TeacherFolder(causal_teacher)]
    for message, teachers in (('cannot express the vision tower test_vit', []), ('^teacher: ', two)):
        with pytest.raises(ConfigError, match=message):
            features(of_run, tmp_path / 'out', teachers=teachers)
    assert not (tmp_path / 'out').exists()
