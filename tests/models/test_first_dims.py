# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Shorter features are the first dimensions of the longer ones, whatever the last layers are."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from trained import trained
from transformers import AutoModel

from llm2clip.config import AdapterConfig, ConfigError, ModelConfig, VisionConfig
from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP, check_dim, keep_first_dims


@pytest.mark.parametrize('adapter', ['residual', 'transformer', 'linear', 'identity'])
@pytest.mark.parametrize('projection', ['linear', 'affine', 'identity'])
@torch.no_grad()
def test_features_are_the_first_values_scaled_to_length_1(adapter: str, projection: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(VisionConfig('test_vit', False, image_size=32), AdapterConfig(adapter, depth=1), embed_dim=64,
                         visual_projection=projection)
    model = LLM2CLIP(config, 64).eval()
    if projection == 'affine':
        torch.nn.init.normal_(model.visual_projection.bias)
    pixels, vectors = torch.randn(3, 3, 32, 32), torch.randn(3, 64)
    whole = model.get_image_features(pixels), model.get_text_features(vectors)
    before = copy.deepcopy(config)
    assert keep_first_dims(model, config, None) is config and model.get_text_features(vectors).equal(whole[1])
    shorter = keep_first_dims(model, config, 12)
    for found, features in zip((model.get_image_features(pixels), model.get_text_features(vectors)), whole):
        torch.testing.assert_close(found, F.normalize(features[:, :12], dim=-1))
    # The new configuration is that of the model, the old one has not changed.
    again = LLM2CLIP(shorter, 64).eval()
    again.load_state_dict(model.state_dict())
    assert again.get_image_features(pixels).equal(model.get_image_features(pixels))
    assert config == before and shorter.embed_dim == 12


@pytest.mark.parametrize('last', ['linear', 'identity'])
@torch.no_grad()
def test_an_export_of_few_dimensions(
    last: str, teacher_folder: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    of_run = trained('timm:test_vit', [teacher_folder, causal_teacher], adapter=last, image_size=32,
                     visual_projection=last)
    model, texts = of_run.model, ['a red square', 'two']
    whole = model.get_image_features(of_run.pixels()), model.get_text_features(of_run.vectors(texts))
    config = keep_first_dims(model, of_run.config, 8)
    export_folder(model, config, of_run.record, of_run.teachers, tmp_path / 'model', remote_code=True)
    loaded = AutoModel.from_pretrained(tmp_path / 'model')
    for found, features in zip((loaded.get_image_features(of_run.pixels()), loaded.get_text_features(texts)), whole):
        torch.testing.assert_close(found, F.normalize(features[:, :8], dim=-1), rtol=0, atol=1e-5)


def test_more_dimensions_than_there_are() -> None:
    check_dim(16, ModelConfig(embed_dim=16), 'dim')
    check_dim(None, ModelConfig(embed_dim=16), 'dim')
    with pytest.raises(ConfigError, match=r'models\.m\.dim: 17, expected at most the 16 dimensions of the model'):
        check_dim(17, ModelConfig(embed_dim=16), 'models.m.dim')
