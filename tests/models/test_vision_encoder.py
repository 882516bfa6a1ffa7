# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vision towers with fused BatchNorms and with LoRA, against the plain computation."""

import copy
import dataclasses
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from peft.tuners.lora import Linear
from torch.func import functional_call
from towers import HALF, SMALL, TOWERS, timm_tower

from llm2clip.config import LoraConfig, TowerConfig, VisionConfig
from llm2clip.errors import ConfigError
from llm2clip.models.vision_encoder import VisionEncoder, fuse_frozen_batch_norms
from llm2clip.models.vision_lora import merge_lora

IMAGES = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
    return model.eval()


class _ReadTwice(nn.Module):
    """Its first convolution's output is also added to the result, and its second BatchNorm runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.norms[0](x) + x
        return (self.norms[1](self.second(x)) + self.norms[1](x)).mean((2, 3))


@pytest.mark.parametrize(('make', 'trained', 'num_fused'), [
    (lambda: timm.create_model('tf_efficientnet_lite0'), 'blocks.3', 40),
    (lambda: timm.create_model('resnet18'), 'layer3', 15),
    (lambda: timm.create_model('resnetv2_50'), 'stages.1.blocks.0', 30),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)), '3', 1),
    (_ReadTwice, 'norms.0', 0),
])
def test_features_and_gradients_are_those_of_both(make: Any, trained: str, num_fused: int) -> None:
    torch.manual_seed(0)
    plain = _with_statistics(make())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    model = copy.deepcopy(plain)
    assert fuse_frozen_batch_norms(model, 64) == num_fused
    model = copy.deepcopy(model)  # as self-distillation does it
    features, expected = model(IMAGES), plain(IMAGES)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    for output in (features, expected):
        (output.square().sum() + output.sum()).backward()
    for (name, parameter), (other_name, other) in zip(model.named_parameters(), plain.named_parameters()):
        assert name == other_name and torch.equal(parameter, other)
        if name.startswith(trained):
            assert parameter.grad is not None and other.grad is not None, name
            scale = other.grad.abs().max().clamp_min(1e-6)
            torch.testing.assert_close(parameter.grad / scale, other.grad / scale, rtol=0, atol=1e-9, msg=name)


def test_only_frozen_layers_are_fused() -> None:
    vision = VisionConfig('tf_efficientnet_lite0', False, image_size=64, freeze_blocks=2)
    encoder = VisionEncoder(vision).train()
    encoder.fuse_frozen_batch_norms()
    fused = [name for name, module in encoder.named_modules() if 'forward' in vars(module)]
    assert {name.rpartition('.')[0] for name in fused} == {'trunk', 'trunk.blocks.0.0', 'trunk.blocks.1.0'}
    assert encoder.training


def test_features_of_several_towers_are_those_of_each() -> None:
    first = timm_tower('test_efficientnet', feature_levels=1, **HALF)
    second = TowerConfig('test_vit', pretrained=False, feature_levels=2)
    third = TowerConfig('a folder', architecture={'model_type': 'clip_vision_model', **SMALL, 'image_size': 64})
    encoder = VisionEncoder(dataclasses.replace(first, beside=[second, third]), load_weights=False).train()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    parts = []
    for config, trained in zip((first, second, third), (encoder, *encoder.beside)):
        alone = VisionEncoder(VisionConfig(**{**vars(first), **vars(config)}), load_weights=False).eval()
        alone.trunk.load_state_dict(trained.trunk.state_dict())
        parts.append(alone(pixels))
    features = encoder(pixels)
    assert features.shape[1] == encoder.width and torch.equal(features, torch.cat(parts, dim=1))
    trainable = {name.split('.')[0] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trainable == {'trunk'}
    encoder.fuse_frozen_batch_norms()
    torch.testing.assert_close(encoder(pixels), features, rtol=1e-4, atol=1e-5)


def test_towers_of_other_pixels_are_refused() -> None:
    other = TowerConfig('tf_efficientnet_b0', pretrained=False)
    with pytest.raises(ConfigError, match=r'^beside\[0\].name: '):
        VisionEncoder(timm_tower('vit_tiny_patch16_224', image_size=224, beside=[other]))


LORA = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0)


def _pair(config: VisionConfig, lora: LoraConfig = LORA) -> tuple[VisionEncoder, VisionEncoder, torch.Tensor]:
    """A tower and the same one with LoRA, in training mode, and images."""
    torch.manual_seed(0)
    plain = VisionEncoder(config).train()
    torch.manual_seed(0)
    return (plain, VisionEncoder(dataclasses.replace(config, lora=lora)).train(),
            torch.randn(2, 3, config.image_size, config.image_size))


@pytest.mark.parametrize('name', ['clip', 'siglip', 'timm_vit', 'timm_eva', 'timm_convnet', 'timm_resnet', 'nfnet'])
def test_lora_adds_its_product_to_features_and_gradients(name: str) -> None:
    plain, lora, pixels = _pair(TOWERS[name] if name in TOWERS else timm_tower('test_nfnet'))
    torch.testing.assert_close(lora(pixels), plain(pixels), rtol=1e-4, atol=1e-5)
    trained = {n: p for n, p in lora.trunk.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and all('lora_' in n for n in trained)
    assert not any(type(module) is Linear for module in lora.modules())  # `LoraLinear` replaces peft's
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    sums: dict[str, torch.Tensor] = dict(plain.trunk.named_parameters())
    for n, a in trained.items():
        if '.lora_A.' in n:
            b, own = trained[n.replace('lora_A', 'lora_B')], n.replace('.lora_A.default', '')
            sums[own] = sums[own] + (6 / 4 * b.flatten(1) @ a.flatten(1)).view_as(sums[own])
    expected = functional_call(plain, {f'trunk.{n}': p for n, p in sums.items()}, (pixels,))
    found = lora(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    weights, direction = list(trained.values()), torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((one * direction).sum(), weights) for one in (found, expected))):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(other.abs().max().item(), 1e-3))
    assert all(lora.layer_ids[n] == plain.layer_ids[n.split('.lora_')[0] + '.weight'] for n in trained)
    merge_lora(lora.trunk)
    plain.load_state_dict(lora.state_dict())
    torch.testing.assert_close(plain(pixels), found, rtol=1e-5, atol=1e-5 * found.abs().max().item())


def test_only_named_projections_of_trained_blocks_get_lora() -> None:
    config = timm_tower('test_vit', freeze_blocks=4)
    _, lora, _ = _pair(config, dataclasses.replace(LORA, target_modules=['qkv']))
    assert {n for n, p in lora.trunk.named_parameters() if p.requires_grad} == {
        f'blocks.{i}.attn.qkv.lora_{side}.default.weight' for i in (4, 5) for side in 'AB'}
    with pytest.raises(ConfigError, match='no projection called q_proj; it has fc1, fc2, proj, qkv'):
        _pair(config, dataclasses.replace(LORA, target_modules=['q_proj', 'qkv']))
