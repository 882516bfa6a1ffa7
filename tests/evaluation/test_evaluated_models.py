# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever is evaluated gives the features that it gives by itself."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluated import load
from parts import make_samples, picture
from PIL import Image
from refusals import refused_at
from towers import projected
from trained import trained
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from llm2clip.config import EvaluateConfig
from llm2clip.config.loading import load_config
from llm2clip.export.check import training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.llm import load_teacher
from llm2clip.teacher.sources import TeacherFolder

TEXTS = [s.captions['long'] for s in make_samples(5)]


def pixels_for(model: Any) -> torch.Tensor:
    return torch.stack([model.preprocess(picture(i), str(i)) for i in range(3)])


def test_an_exported_model_has_the_features_of_the_run(
    exported: tuple[LLM2CLIP, Path], teacher_folder: Path, tmp_path: Path
) -> None:
    model, folder = exported
    found = load(tmp_path, export=str(folder))
    features, pooled = found.image_features(pixels_for(found))
    floats = torch.stack([training_pixels(picture(i), preprocessing=model.vision_encoder.preprocessing)
                          for i in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(features, model.get_image_features(floats))
        torch.testing.assert_close(pooled, model.vision_encoder(floats))
        expected = model.get_text_features(encode_texts(*load_teacher(teacher_folder), TEXTS))
    torch.testing.assert_close(found.text_features(TEXTS)[0], expected)


def test_few_dimensions_are_the_first_scaled_to_length_1(exported: tuple[LLM2CLIP, Path], tmp_path: Path) -> None:
    whole, few = (load(tmp_path, export=str(exported[1]), truncate_dim=dim) for dim in (None, 6))
    (images, pooled), (short_images, same) = (model.image_features(pixels_for(model)) for model in (whole, few))
    assert torch.equal(pooled, same)
    for found, features in ((short_images, images), (few.text_features(TEXTS)[0], whole.text_features(TEXTS)[0])):
        torch.testing.assert_close(found, F.normalize(features[:, :6], dim=-1))
    with refused_at('truncate_dim'):
        load(tmp_path, export=str(exported[1]), truncate_dim=17)


def test_texts_are_embedded_once(
    exported: tuple[LLM2CLIP, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tmp_path, export=str(exported[1])).text_features(TEXTS)[0]
    other = load(tmp_path, export=str(exported[1])).text_features(TEXTS[::-1])[0]
    torch.testing.assert_close(other, first.flip(0))
    # Another precision gives other vectors, which are not those in the cache.
    bf16, expected = (load(tmp_path / cache, export=str(exported[1]), precision='amp_bf16').text_features(TEXTS)[0]
                      for cache in ('', 'new'))
    assert torch.equal(bf16, expected) and not torch.equal(bf16, first)
    # Only the last of two blocks is cached.
    many = [*map(str, range(1024)), *TEXTS]
    torch.testing.assert_close(load(tmp_path, export=str(exported[1])).text_features(many)[0][1024:], first)

    monkeypatch.setattr(TeacherFolder, 'load', lambda *_, **__: 1 / 0)
    assert torch.equal(load(tmp_path, export=str(exported[1])).text_features(TEXTS)[0], first)
    with pytest.raises(ZeroDivisionError):
        load(tmp_path, export=str(exported[1])).text_features([*TEXTS, 'more'])


def test_bfloat16_is_near_float32(exported: tuple[LLM2CLIP, Path], baseline: Path, tmp_path: Path) -> None:
    for options in ({'export': str(exported[1])}, {'pretrained': str(baseline)}):
        full, narrow = (load(tmp_path, **options, precision=precision) for precision in ('fp32', 'amp_bf16'))
        pairs = [*zip(full.image_features(pixels_for(full)), narrow.image_features(pixels_for(full))),
                 (full.text_features(TEXTS)[0], narrow.text_features(TEXTS)[0])]
        for one, other in pairs:
            assert one.dtype == other.dtype == torch.float32 and not torch.equal(one, other)
            assert float((one - other).norm() / one.norm()) < 0.05


def test_texts_that_lose_their_end_are_counted(exported: tuple[LLM2CLIP, Path], baseline: Path, tmp_path: Path) -> None:
    texts = ['a ' * 500, 'a', 'b ' * 500]
    ours, theirs = load(tmp_path, export=str(exported[1])), load(tmp_path, pretrained=str(baseline))
    assert ours.text_features(texts)[1] == ours.text_features(texts)[1] == theirs.text_features(texts)[1] == 2
    tokenizer = AutoTokenizer.from_pretrained(baseline)
    just = next(text for text in ('a' * n for n in range(100)) if len(tokenizer(text).input_ids) == 12)
    assert ours.text_features(['a'])[1] == theirs.text_features(['a', just])[1] == 0
    assert theirs.text_features([just + just])[1] == 1


def test_baseline_with_its_own_text_tower(baseline: Path, tmp_path: Path) -> None:
    found = load(tmp_path, pretrained=str(baseline))
    model: Any = AutoModel.from_pretrained(baseline).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(baseline), AutoTokenizer.from_pretrained(baseline)
    images = [Image.open(io.BytesIO(picture(i))) for i in range(3)]
    texts = [*TEXTS, 'a']
    # SigLIP's texts are padded to full length without a mask, which changes what a short one means.
    padding = 'max_length' if model.config.model_type == 'siglip' else True
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=12, return_tensors='pt')
    if model.config.model_type == 'siglip':
        tokens.pop('attention_mask')
    with torch.no_grad():
        expected = F.normalize(projected(model.get_image_features(**processor(images, return_tensors='pt'))), dim=-1)
        expected_texts = F.normalize(projected(model.get_text_features(**tokens)), dim=-1)
    calls: list[int] = []
    found.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(found.image_features(pixels_for(found))[0], expected)
    assert len(calls) == 1
    torch.testing.assert_close(found.text_features(texts)[0], expected_texts)
    torch.testing.assert_close(found.text_features(['a'])[0], expected_texts[5:])


@pytest.mark.parametrize(('options', 'key'), [
    ([], 'm'), (['run=a', 'export=b'], 'm'), (['pretrained=x', 'truncate_dim=64'], 'm.truncate_dim'),
    (['pretrained=x', 'wise_ft_alpha=0.5'], 'm.wise_ft_alpha')])
def test_settings_of_models_that_conflict_are_refused(options: list[str], key: str) -> None:
    settings = [f'models.m.{option}' for option in options or ['precision=fp32']]
    with refused_at(f'models.{key}'):
        load_config(EvaluateConfig, ['out=o', 'retrieval.r.local=d', *settings])


def test_a_missing_baseline_or_teacher_is_named(exported: tuple[LLM2CLIP, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='pretrained: nowhere/at-all: cannot be loaded'):
        load(tmp_path, pretrained='nowhere/at-all')
    shutil.copytree(exported[1], tmp_path / 'export')
    shutil.rmtree(tmp_path / 'export/teacher')
    with refused_at('teacher'):
        load(tmp_path, export=f'{tmp_path}/export')


def test_several_teachers_are_taken_in_their_order(teacher_folder: Path, causal_teacher: Path, tmp_path: Path) -> None:
    teachers = [teacher_folder, causal_teacher]
    of_run = trained('timm:test_vit', teachers)
    export_folder(*of_run, tmp_path / 'export')
    found = load(tmp_path, export=str(tmp_path / 'export'))
    with torch.no_grad():
        torch.testing.assert_close(found.text_features(TEXTS)[0], of_run.model.get_text_features(of_run.vectors(TEXTS)))
    assert found.text_features(['a', 'b ' * 500])[1] == 1
    for wrong, message in (([teacher_folder], '1 teachers named here or by .*, expected 2'),
                           (teachers[::-1], 'another teacher')):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, export=str(tmp_path / 'export'), teacher=list(map(str, wrong)))
