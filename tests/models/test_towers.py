# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vision towers of both libraries: weights, resolution, layers, locks, dropped patches."""

import copy
import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from composer.devices import DeviceCPU
from refusals import refused_at
from safetensors.torch import save_file
from towers import HALF, SMALL, TOKEN_TOWERS, TOWERS, hf_tower, projected, timm_tower
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel

from llm2clip.config import AdapterConfig, ExtractImagesConfig, ModelConfig, VisionConfig
from llm2clip.errors import ConfigError, FileError
from llm2clip.modeling.image_processing_llm2clip import normalize
from llm2clip.models.frozen_tower import load_frozen_tower
from llm2clip.models.llm2clip import LLM2CLIP, projection_kind
from llm2clip.models.towers import tower_preprocessing
from llm2clip.models.vision_encoder import VisionEncoder, kept_patches
from llm2clip.training.optim import parameter_groups

# How many layers are repeated in each of them.
BLOCKS = {**dict.fromkeys(('clip', 'siglip', 'vit', 'dinov2'), 3), 'timm_vit': 6, 'timm_eva': 12, 'timm_convnet': 5,
          'timm_convnext': 12, 'timm_resnet': 3, 'timm_levels': 5}


def _encoder(config: VisionConfig) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(config)


def _images(encoder: VisionEncoder, n: int = 3) -> torch.Tensor:
    size = encoder.preprocessing.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def clip_folder(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with both towers, as it is published, and unusual statistics of pixels."""
    folder = shutil.copytree(clip, tmp_path_factory.mktemp('towers') / 'clip')
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('name', TOWERS)
def test_an_image_has_its_features_whatever_its_batch(name: str) -> None:
    encoder = _encoder(TOWERS[name]).train()
    images, before = _images(encoder), copy.deepcopy(dict(encoder.named_buffers()))
    features = encoder(images)
    assert features.shape == (3, encoder.width)
    assert all(torch.equal(buffer, before[buffer_name]) for buffer_name, buffer in encoder.named_buffers())
    torch.testing.assert_close(encoder(images[1:2]), features[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('name', 'last_modules'), [
    ('test_efficientnet', ['blocks.3', 'blocks.4']), ('test_vit', ['blocks.4', 'blocks.5'])])
def test_means_of_the_last_maps_follow_the_pooled_features(name: str, last_modules: list[str]) -> None:
    plain = _encoder(timm_tower(name)).eval()
    encoder = _encoder(timm_tower(name, feature_levels=2)).eval()
    encoder.load_state_dict(plain.state_dict())
    maps = []
    for module in last_modules:
        plain.trunk.get_submodule(module).register_forward_hook(lambda module, inputs, output: maps.append(output))
    images = _images(plain)
    with torch.no_grad():
        parts = [plain(images)]
        for feature_map in maps:
            if name == 'test_vit':
                parts.append(feature_map[:, 1:].mean(1))
            else:
                parts.append(feature_map.mean((2, 3)))
        expected = torch.cat([nn.functional.normalize(part, dim=-1) for part in parts], dim=1)
        torch.testing.assert_close(encoder(images), expected)
    assert encoder.width == expected.shape[1]


def test_a_layer_between_pooling_and_classifier_belongs_to_the_tower() -> None:
    encoder = _encoder(timm_tower('lcnet_035')).eval()
    assert encoder(_images(encoder)).shape == (3, encoder.width)


@pytest.mark.parametrize('name', TOWERS)
def test_layers_are_in_order(name: str) -> None:
    encoder = _encoder(TOWERS[name])
    ids = encoder.layer_ids
    assert ids.keys() == {n for n, _ in encoder.trunk.named_parameters()}
    assert set(ids.values()) == set(range(encoder.num_layers)) and encoder.num_layers > 2
    found = [ids[n] for n, _ in encoder.trunk.named_parameters()]
    assert found[0] == 0 and found[-1] == max(found)
    if name in TOKEN_TOWERS:  # as in the official code, the norm after the blocks is no part of the last one
        assert encoder.num_layers == len(encoder.tower.blocks()) + 2
        last = {id(p) for p in encoder.tower.blocks()[-1].parameters()}
        assert all(ids[n] == encoder.num_layers - 2 for n, p in encoder.trunk.named_parameters() if id(p) in last)


def _forward_passes(encoder: VisionEncoder) -> list[int]:
    """How often each block's modules ran in a step, of which the gradients are kept."""
    runs: list[Counter[nn.Module]] = []
    for block in encoder.tower.blocks():
        runs.append(Counter())
        for inner in block.modules():
            inner.register_forward_hook(lambda module, *_, of_block=runs[-1]: of_block.update([module]))
    encoder.train()(_images(encoder)).square().sum().backward()
    return [max(of_block.values()) for of_block in runs]


@pytest.mark.parametrize('name', TOWERS)
def test_checkpointing_runs_blocks_twice_for_the_same_gradients(name: str) -> None:
    encoder, config = _encoder(TOWERS[name]), copy.deepcopy(TOWERS[name])
    config.gradient_checkpointing = True
    other = _encoder(config)
    once, twice = _forward_passes(encoder), _forward_passes(other)
    assert len(once) == BLOCKS[name] and all(again > runs for again, runs in zip(twice, once))
    for (n, p), q in zip(encoder.named_parameters(), other.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=n)


def test_the_image_side_of_a_clip_is_that_of_transformers(clip_folder: Path) -> None:
    config = VisionConfig(str(clip_folder), image_size=32)
    encoder = _encoder(config).eval()
    assert encoder.preprocessing.mean == (0.1, 0.2, 0.3) and encoder.preprocessing.std == (0.4, 0.5, 0.6)
    reference, images = CLIPVisionModel.from_pretrained(clip_folder), _images(encoder)
    torch.testing.assert_close(encoder(images), reference(images).pooler_output)
    pixels = torch.randint(256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(encoder(pixels), encoder(normalize(pixels, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))))
    random = _encoder(VisionConfig(str(clip_folder), False, image_size=32)).eval()
    assert not torch.allclose(random(images), encoder(images), atol=1e-2)


def test_missing_weights_are_named(clip_folder: Path, tmp_path: Path) -> None:
    deeper = {'model_type': 'clip_vision_model', **SMALL, 'patch_size': 16, 'num_hidden_layers': 3}
    with pytest.raises(ValueError, match=r'clip.*: the weights lack .*layers\.2.* and have \[\]'):
        VisionEncoder(VisionConfig(str(clip_folder), pretrained=True, image_size=32, architecture=deeper))
    with pytest.raises(FileError):
        tower_preprocessing(VisionConfig(str(tmp_path)))
    state = {k: v for k, v in timm.create_model('test_vit').state_dict().items() if k != 'blocks.1.norm1.bias'}
    save_file(state, tmp_path / 'w.safetensors')
    with pytest.raises(ConfigError, match=r"w.safetensors lacks \['blocks.1.norm1.bias'\]"):
        VisionEncoder(timm_tower('test_vit', checkpoint=str(tmp_path / 'w.safetensors')))


def test_a_timm_checkpoint_fits_another_resolution(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = timm.create_model('test_vit', img_size=160)
    save_file({k: v for k, v in source.state_dict().items() if not k.startswith('head.')}, tmp_path / 'w.safetensors')
    same = _encoder(timm_tower('test_vit', checkpoint=str(tmp_path / 'w.safetensors'), image_size=160)).eval()
    images = _images(same)
    torch.testing.assert_close(same(images), source.eval().forward_head(source.forward_features(images),
                                                                        pre_logits=True))
    small = _encoder(timm_tower('test_vit', checkpoint=str(tmp_path / 'w.safetensors'), image_size=64))
    assert small.trunk.pos_embed.shape[1] == 1 + 16 and small(_images(small)).shape == (3, small.width)


@pytest.mark.parametrize('size', [32, 64])
@pytest.mark.parametrize('model_type', ['clip_vision_model', 'siglip_vision_model', 'vit'])
def test_position_embeddings_are_interpolated(model_type: str, size: int, tmp_path: Path) -> None:
    native = _encoder(hf_tower(model_type))
    name, table = next((n, p) for n, p in native.trunk.named_parameters() if 'position_embedding' in n)
    prefix = table.view(-1, 32).shape[0] - 16
    rows = torch.arange(16) // 4
    with torch.no_grad():
        table.view(-1, 32)[:prefix] = 7
        table.view(-1, 32)[prefix:] = rows[:, None].float()
    native.trunk.save_pretrained(tmp_path)
    config = VisionConfig(str(tmp_path), pretrained=True, image_size=size, **HALF)
    found = dict(_encoder(config).trunk.named_parameters())[name].detach().view(-1, 32)
    side = size // 8
    assert found.shape[0] == prefix + side ** 2 and (found[:prefix] == 7).all()
    grid = found[prefix:].view(side, side, 32)
    assert torch.allclose(grid, grid[:, :1, :1], atol=1e-5) and (grid[:, 0, 0].diff() > 0).all()
    assert grid.mean().item() == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize('name', ['clip', 'timm_vit'])
def test_frozen_blocks_have_no_gradients(name: str) -> None:
    config = copy.deepcopy(TOWERS[name])
    config.freeze_blocks = 1
    encoder = _encoder(config)
    for n, p in encoder.trunk.named_parameters():
        assert p.requires_grad is (encoder.layer_ids[n] > 1), n
    config.freeze = True
    encoder = _encoder(config).train()
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.trunk.training


@pytest.mark.parametrize(('tower', 'key'), [
    (timm_tower('test_efficientnet', feature_levels=9), 'feature_levels'),
    (timm_tower('test_vit', feature_levels=13), 'feature_levels'),
    (hf_tower('clip_vision_model', feature_levels=1), 'feature_levels'),
    (timm_tower('test_vit', mean=HALF['mean']), 'mean'), (timm_tower('test_vit', std=HALF['std']), 'mean'),
    (hf_tower('clip_vision_model', checkpoint='x.pt'), 'checkpoint'),
    (hf_tower('clip_vision_model', freeze_blocks=9), 'freeze_blocks'),
    (timm_tower('test_vit', freeze_blocks=9), 'freeze_blocks')])
def test_settings_that_do_not_fit_a_tower_are_refused_by_the_key_of_the_recipe(tower: VisionConfig, key: str) -> None:
    with refused_at(f'model.vision.{key}'):
        LLM2CLIP(ModelConfig(tower), 8)
    with refused_at(f'vision.{key}'):
        load_frozen_tower(ExtractImagesConfig(vision=tower), DeviceCPU())


@pytest.mark.parametrize('name', TOKEN_TOWERS)
def test_dropped_patches_depend_on_the_sample_alone(name: str) -> None:
    encoder = _encoder(TOKEN_TOWERS[name]).train()
    images, seeds = _images(encoder, 4), torch.tensor([5, 6, 5, 2 ** 62 + 1])
    whole = encoder(images, seeds)
    encoder.drop_patches(0.5)
    tokens: list[int] = []
    encoder.tower.blocks()[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    dropped = encoder(images, seeds)
    torch.testing.assert_close(encoder(images[1:], seeds[1:]), dropped[1:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dropped, whole, atol=1e-3)
    assert not torch.allclose(encoder(images[:1], seeds[1:2]), dropped[:1], atol=1e-4)
    torch.testing.assert_close(encoder.eval()(images, seeds), whole, rtol=1e-4, atol=1e-4)
    prefix = tokens[-1] - 16  # without the patches
    assert tokens[0] == prefix + 8 and prefix in (0, 1)
    with pytest.raises(AssertionError, match='sample_seed'):
        encoder.train()(images)


def test_kept_patches_are_evenly_drawn() -> None:
    counts = torch.bincount(kept_patches(torch.arange(4000), 20, 0.75).flatten(), minlength=20)
    assert counts.min() > 880 and counts.max() < 1120
    for without in (TOWERS['timm_convnet'], timm_tower('test_vit', feature_levels=1)):
        with refused_at('algorithms.patch_dropout'):
            _encoder(without).drop_patches(0.5)


@pytest.mark.parametrize('name', ['clip', 'siglip', 'timm_vit', 'timm_eva', 'timm_convnet'])
def test_learning_rates_fall_with_depth_and_decay_spares_biases(name: str) -> None:
    model = LLM2CLIP(ModelConfig(TOWERS[name], AdapterConfig(depth=1), embed_dim=16), 8)
    encoder = model.vision_encoder
    groups = parameter_groups(model, 1e-3, 0.05, {'adapter': 10.0, 'logit_scale': 2.0}, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group['params']}
    assert len(of) == len(list(model.parameters()))
    last = encoder.num_layers - 1
    for n, p in encoder.trunk.named_parameters():
        assert of[id(p)]['lr'] == pytest.approx(1e-3 * 0.5 ** (last - encoder.layer_ids[n])), n
        spared = p.ndim < 2 or 'pos' in n or 'cls_token' in n
        assert of[id(p)]['weight_decay'] == (0.0 if spared else 0.05), n
    rates = {of[id(p)]['lr'] for p in (model.visual_projection.weight, model.adapter.projection.weight,
                                       model.logit_scale)}
    assert rates == {1e-3, 1e-2, 2e-3}
    with pytest.raises(ConfigError, match='towr'):
        parameter_groups(model, 1e-3, 0.0, {'towr': 0.1})


def test_the_projection_of_a_clip_is_that_of_transformers(clip_folder: Path) -> None:
    vision = VisionConfig(str(clip_folder), pretrained=True, image_size=32)
    whole = CLIPModel.from_pretrained(clip_folder).eval()
    config = ModelConfig(vision, embed_dim=32, visual_projection='pretrained')
    model = LLM2CLIP(config, 8).eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = nn.functional.normalize(projected(whole.get_image_features(pixel_values=pixels)), dim=-1)
    torch.testing.assert_close(model.get_image_features(pixels), expected, rtol=1e-4, atol=1e-5)
    assert projection_kind(model.visual_projection) == 'linear' and model.visual_projection.weight.requires_grad
    # Built to load a checkpoint of the whole model, by the configuration alone.
    empty = LLM2CLIP(config, 8, load_weights=False)
    empty.load_state_dict(model.state_dict())
    for change in ({'embed_dim': 640}, {'adapter': AdapterConfig('identity')}):
        with pytest.raises(ConfigError, match='model.embed_dim'):
            LLM2CLIP(dataclasses.replace(config, **change), 8)


def test_the_projection_of_a_timm_model_is_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk: Any = timm.create_model('test_vit', num_classes=24).eval()
    timm.models.save_for_hf(trunk, str(tmp_path), safe_serialization=True)
    vision = VisionConfig(f'local-dir:{tmp_path}', pretrained=True, image_size=160)
    model = LLM2CLIP(ModelConfig(vision, embed_dim=24, visual_projection='pretrained'), 8).eval()
    pixels = torch.randn(2, 3, 160, 160)
    expected = nn.functional.normalize(trunk(pixels), dim=-1)
    torch.testing.assert_close(model.get_image_features(pixels), expected, rtol=1e-4, atol=1e-5)
    assert projection_kind(model.visual_projection) == 'affine'
    without = {name: value for name, value in timm.create_model('test_vit').state_dict().items() if 'head.' not in name}
    save_file(without, tmp_path / 'tower.safetensors')
    vision = VisionConfig('test_vit', checkpoint=str(tmp_path / 'tower.safetensors'), image_size=160)
    with pytest.raises(ConfigError, match=r"tower.safetensors lacks \['head.weight', 'head.bias'\]"):
        LLM2CLIP(ModelConfig(vision, embed_dim=1000, visual_projection='pretrained'), 8)
