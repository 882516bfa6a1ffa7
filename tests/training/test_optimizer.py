# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Optimizers as a configuration describes them, fused and not."""

from typing import Any, Optional

import pytest
import torch

import llm2clip.training.optim
from llm2clip.config import AdapterConfig, FsdpConfig, ModelConfig, TrainConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.training.optim import build_optimizer


@pytest.fixture(scope='module')
def model() -> LLM2CLIP:
    torch.manual_seed(0)
    vision = VisionConfig('test_vit', False, image_size=32)
    return LLM2CLIP(ModelConfig(vision, AdapterConfig(depth=1), embed_dim=16), 8)


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
