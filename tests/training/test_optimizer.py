# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Optimizers as a configuration describes them: fused and not, and checkpoints of one for the other."""

import copy
from typing import Any, Optional

import pytest
import torch

import llm2clip.training.optim
from llm2clip.config import AdapterConfig, FsdpConfig, ModelConfig, Stage2Config, TrainConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.training.optim import build_optimizer

OPTIMIZERS = {
    'adamw': {'name': 'adamw', 'lr': 1e-2, 'weight_decay': 0.05, 'betas': [0.9, 0.95]},
    'sgd': {'name': 'sgd', 'lr': 1e-2, 'weight_decay': 0.05, 'momentum': 0.9},
}
# torch's plain loop, which is what the others are measured by.
LOOP = {'foreach': False, 'fused': False}
FUSED = {'fused': True}


@pytest.fixture(scope='module')
def model() -> LLM2CLIP:
    torch.manual_seed(0)
    vision = VisionConfig('test_vit', False, image_size=32)
    return LLM2CLIP(ModelConfig(vision, AdapterConfig(depth=1), embed_dim=16), 8)


def _optimizer(model: torch.nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    """Over the groups of stage 2: layer-wise learning rates, and no decay for some."""
    return build_optimizer(Stage2Config(optimizer=arguments, layer_decay=0.8, lr_scale={'adapter': 2.0}), model)


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return list(model.parameters())


def _assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for parameter, other, initial in zip(found, expected, before, strict=True):
        assert not torch.equal(other, initial)
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize(('first', 'second'), [(FUSED, LOOP), (LOOP, FUSED)])
def test_either_goes_on_from_the_other(name: str, first: dict, second: dict, model: LLM2CLIP) -> None:
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    expected = _train(whole, _optimizer(whole, **OPTIMIZERS[name], **LOOP), range(6))
    begun = _optimizer(parts, **OPTIMIZERS[name], **first)
    _train(parts, begun, range(3))
    resumed = _optimizer(parts, **OPTIMIZERS[name], **second)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    assert all(group['fused'] is second['fused'] for group in resumed.param_groups)
    _assert_close(_train(parts, resumed, range(3, 6)), expected, list(model.parameters()))


@pytest.mark.parametrize(('arguments', 'fused', 'sharded'), [
    ({'name': 'adamw'}, True, True), ({'name': 'sgd'}, True, False), ({'name': 'adamw', 'fused': False}, False, False),
    ({'name': 'adamw', 'foreach': True}, False, False), ({'name': 'decoupled_adamw'}, False, False)])
def test_on_a_gpu_it_is_fused_where_it_can_be(
    arguments: dict[str, Any], fused: bool, sharded: bool, model: LLM2CLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(fsdp: Optional[FsdpConfig]) -> bool:
        config = TrainConfig(optimizer={'lr': 0.1, **arguments}, fsdp=fsdp)
        return bool(build_optimizer(config, model).defaults.get('fused'))

    assert not chosen(None)
    monkeypatch.setattr(llm2clip.training.optim, 'device_kind', lambda device: 'gpu')
    assert (chosen(None), chosen(FsdpConfig())) == (fused, sharded)
