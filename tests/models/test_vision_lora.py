# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LoRA on vision towers against W + (alpha / r) B A, computed by hand on the tower without it."""

import dataclasses

import pytest
import torch
from torch.func import functional_call
from towers import TOWERS, timm_tower

from llm2clip.config import LoraConfig, VisionConfig
from llm2clip.errors import ConfigError
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.models.vision_lora import merge_lora

LORA = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0)


def _pair(config: VisionConfig, lora: LoraConfig = LORA) -> tuple[VisionEncoder, VisionEncoder, torch.Tensor]:
    """A tower and the same one with LoRA, in training mode, and images."""
    torch.manual_seed(0)
    plain = VisionEncoder(config).train()
    torch.manual_seed(0)
    return (plain, VisionEncoder(dataclasses.replace(config, lora=lora)).train(),
            torch.randn(2, 3, config.image_size, config.image_size))


@pytest.mark.parametrize('name', ['clip', 'siglip', 'timm_vit', 'timm_eva', 'timm_convnet', 'timm_resnet', 'nfnet'])
def test_features_and_gradients_are_those_of_the_sum(name: str) -> None:
    plain, lora, pixels = _pair(TOWERS[name] if name in TOWERS else timm_tower('test_nfnet'))
    torch.testing.assert_close(lora(pixels), plain(pixels), rtol=1e-4, atol=1e-5)
    trained = {n: p for n, p in lora.trunk.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and all('lora_' in n for n in trained)
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
