# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Optimizers as a configuration describes them, fused and not."""

from typing import Any, Optional

import pytest
import torch

from llm2clip.config import AdapterConfig, FsdpConfig, ModelConfig, Stage2Config, TrainConfig, VisionConfig
from llm2clip.config.ranges import DeviceName
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
    arguments: dict[str, Any], fused: bool, sharded: bool, model: LLM2CLIP
) -> None:
    def chosen(fsdp: Optional[FsdpConfig], device: Optional[DeviceName] = 'gpu') -> bool:
        config = TrainConfig(optimizer={'lr': 0.1, **arguments}, fsdp=fsdp, device=device)
        return bool(build_optimizer(config, model).defaults.get('fused'))

    assert not chosen(None, 'cpu') and chosen(None, None) == (fused and torch.cuda.is_available())
    assert (chosen(None), chosen(FsdpConfig())) == (fused, sharded)


def test_lr_scale_multiplies_layer_decay(model: LLM2CLIP) -> None:
    def rates(scale: float) -> list[float]:
        """Return the learning rates in ascending order, each once."""
        config = Stage2Config(optimizer={'name': 'sgd', 'lr': 1.0}, layer_decay=0.5, lr_scale={'vision_encoder': scale})
        return sorted({group['lr'] for group in build_optimizer(config, model).param_groups})

    *layers, rest = rates(0.25)
    assert layers == [0.25 * rate for rate in rates(1.0)] and rest == 1.0
    assert len(layers) == model.vision_encoder.num_layers
