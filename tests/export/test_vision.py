# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The vision tower alone: the class that it becomes, and training that continues from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from composer.devices import DeviceCPU
from PIL import Image
from recipes_in_process import example_of_the_page
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from towers import write_clip
from trained import PIXELS, SMALL, trained
from transformers import AutoProcessor, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from llm2clip.config import AdapterConfig, ClipTextConfig, ModelConfig, Stage2Config, TrainableTextConfig, VisionConfig
from llm2clip.errors import ConfigError
from llm2clip.export.vision import export_clip, export_vision
from llm2clip.models.llm2clip import LLM2CLIP, truncate_dims
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.teacher.clip_text import ClipText, load_clip_text, load_clip_tokenizer, save_clip_text

IMAGE_TOKEN, PATCHES = 3, 16
PATCH_WEIGHT = 'vision_model.embeddings.patch_embedding.weight'


@pytest.mark.parametrize('vision, projection, name, weight', [
    ('clip_vision_model', True, 'CLIPVisionModelWithProjection', PATCH_WEIGHT),
    ('clip_vision_model', False, 'CLIPVisionModel', PATCH_WEIGHT),
    ('timm:test_vit', True, 'test_vit', 'head.weight'), ('timm:test_vit', False, 'test_vit', 'cls_token'),
    ('siglip_vision_model', True, 'SiglipVisionModel', PATCH_WEIGHT),
    ('dinov2', True, 'Dinov2Model', 'encoder.layer.0.attention.attention.query.weight')])
def test_training_goes_on_from_the_exported_tower(
    vision: str, projection: bool, name: str, weight: str, teacher_folder: Path, tmp_path: Path
) -> None:
    of_run, out = trained(vision, [teacher_folder]), tmp_path / 'tower'
    of_run.model.to(memory_format=torch.channels_last)  # as a training leaves it
    assert export_vision(*of_run[:3], out, projection=projection) == name
    is_timm, size = vision.startswith('timm'), of_run.config.vision.image_size
    again = VisionEncoder(VisionConfig(f'local-dir:{out}' if is_timm else str(out), pretrained=True, image_size=size))
    assert again.preprocessing == of_run.model.vision_encoder.preprocessing
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(of_run.pixels()), of_run.model.vision_encoder(of_run.pixels()))
    assert weight in load_file(out / 'model.safetensors')  # a name that every version of transformers reads
    card, config = (out / 'README.md').read_text(), json.loads((out / 'config.json').read_text())
    assert f'library_name: {"timm" if is_timm else "transformers"}' in card and name in card
    assert config['num_classes'] == 32 * projection if is_timm else config['architectures'] == [name]
    if vision.startswith('clip'):
        processor = json.loads((out / 'preprocessor_config.json').read_text())
        assert processor['image_processor_type'] == 'CLIPImageProcessorFast'  # its name in every version


def test_what_its_class_has_no_place_for_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    levels = trained('timm:test_efficientnet', [teacher_folder], feature_levels=1)
    with pytest.raises(ConfigError, match='^run: .*export_hf'):
        export_vision(*levels[:3], tmp_path / 'tower')
    of_run = trained('clip_vision_model', [teacher_folder])
    of_run.model.visual_projection = nn.Linear(32, 32)
    with pytest.raises(ConfigError, match='^projection: '):
        export_vision(*of_run[:3], tmp_path / 'tower')
    assert not (tmp_path / 'tower').exists()
    export_vision(*of_run[:3], tmp_path / 'tower', projection=False)
    of_timm = trained('timm:test_vit', [teacher_folder])  # whose head has a bias
    of_timm.model.visual_projection = nn.Linear(of_timm.model.vision_encoder.width, 32)
    export_vision(*of_timm[:3], tmp_path / 'timm')


@torch.no_grad()
def test_a_clip_that_was_fine_tuned_is_one_clip_model(llm_folder: Path, tmp_path: Path) -> None:
    clip = str(write_clip(tmp_path / 'clip', llm_folder))
    tower = load_clip_text(ClipTextConfig(clip)).eval()
    save_clip_text(tower, {name: value + 0.01 for name, value in tower.state_dict().items()},
                   load_clip_tokenizer(ClipTextConfig(clip)), tmp_path / 'text')
    config = ModelConfig(VisionConfig(clip, pretrained=True, image_size=32, **PIXELS), AdapterConfig('identity'),
                         embed_dim=32, visual_projection='pretrained', logit_scale=7.0)
    model = LLM2CLIP(config, 32).eval()
    model.visual_projection.weight.mul_(torch.linspace(1, 2, 32)[:, None])
    config = truncate_dims(model, config, 24)
    run = Stage2Config(trainable_text=TrainableTextConfig(clip=ClipTextConfig(clip)), model=config)
    export_clip(model, config, run, tmp_path / 'text', tmp_path / 'out')
    loaded = CLIPModel.from_pretrained(tmp_path / 'out')
    processor: Any = AutoProcessor.from_pretrained(tmp_path / 'out', use_fast=True)
    texts, image = ['a red square', 'a blue circle, painted on a plain wall'], Image.new('RGB', (50, 40), 'red')
    outputs = loaded(**processor(text=texts, images=image, return_tensors='pt', padding=True, truncation=True))
    images = model.get_image_features(processor(images=image, return_tensors='pt').pixel_values)
    expected = model.get_text_features(ClipText(tmp_path / 'text', cut=True).load(DeviceCPU()).embed(texts).vectors)
    torch.testing.assert_close(outputs.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.text_embeds, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.logits_per_image, 7 * images @ expected.T, rtol=1e-4, atol=1e-4)
    sentences = SentenceTransformer(str(tmp_path / 'out'), device='cpu')
    for given, features in ((texts, expected), ([image], images)):
        torch.testing.assert_close(torch.as_tensor(sentences.encode(given, normalize_embeddings=True)), features)
    model.adapter.bias.add_(1)
    with pytest.raises(ConfigError, match='^run: has model.adapter, which a CLIPModel of'):
        export_clip(model, config, run, tmp_path / 'text', tmp_path / 'other')


@pytest.fixture(scope='module')
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5's layout: CLIP's last but one layer without class token, an MLP of two layers, a Llama."""
    torch.manual_seed(0)
    vision = {'model_type': 'clip_vision_model', **SMALL}
    text = {'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 32, 'intermediate_size': 64,
            'num_hidden_layers': 2, 'num_attention_heads': 4}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN,
                         image_seq_length=PATCHES)
    folder = tmp_path_factory.mktemp('llava')
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_in_llava_as_the_readme_puts_it_there(
    llava_folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = trained('clip_vision_model', [teacher_folder])
    monkeypatch.chdir(tmp_path)
    export_vision(*of_run[:3], 'runs/vision')
    names: dict[str, object] = {}
    published = 'llava-hf/llava-1.5-7b-hf'
    exec(example_of_the_page(published).replace(published, str(llava_folder)), names)
    llava = names['llava']
    assert isinstance(llava, LlavaForConditionalGeneration)

    pixels = of_run.pixels()
    reached: list[torch.Tensor] = []
    projector = llava.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: reached.append(args[0]))
    ids = torch.tensor([[1] + [IMAGE_TOKEN] * PATCHES + [5, 6 + i] for i in range(3)])
    inputs = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'pixel_values': pixels}
    outputs = llava(**inputs, labels=ids.masked_fill(ids == IMAGE_TOKEN, -100))
    layers = of_run.model.vision_encoder.trunk(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(reached[0], layers[-2][:, 1:], rtol=0, atol=1e-5)
    assert outputs.logits.shape == (3, PATCHES + 3, 64)
