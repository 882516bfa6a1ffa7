# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The stage-2 model against reference computations; those of the adapter are with the official weights."""

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from composer.core import Event

from llm2clip.config import AdapterConfig, LossConfig, ModelConfig, SelfDistillationConfig, VisionConfig
from llm2clip.errors import ConfigError
from llm2clip.losses.distillation import instance_loss, structure_loss
from llm2clip.modeling.adapter import make_projection
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP, check_truncate_dim, truncate_dims
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.training.algorithms.batches import InitialImages
from llm2clip.training.algorithms.weights import ClampLogitScale

TINY = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=2), embed_dim=16)


def test_features_are_normalised_and_start_as_in_clip() -> None:
    model = LLM2CLIP(TINY, 8).eval()
    image, text, scale = model(torch.randn(3, 3, 32, 32), torch.randn(3, 8)).values()
    torch.testing.assert_close(torch.cat([image, text]).norm(dim=-1), torch.ones(6))
    assert scale.shape == (1,) and scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    weight = model.visual_projection.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize('loss', ['clip', 'siglip'])
def test_each_head_is_a_model_of_its_own(loss: Any) -> None:
    config = dataclasses.replace(TINY, heads=2, logit_bias=-2.0 if loss == 'siglip' else None)
    whole = ComposerLLM2CLIP(LLM2CLIP(config, 8).eval(), LossConfig(loss))
    batch = {'pixel_values': torch.randn(4, 3, 32, 32), 'text_embedding': torch.randn(4, 3, 8)}
    features = whole(batch)
    similarities, losses = [], []
    for i in range(2):
        head = LLM2CLIP(dataclasses.replace(config, heads=1, embed_dim=8), 8).eval()
        head.vision_encoder.load_state_dict(whole.model.vision_encoder.state_dict())
        for side in ('visual_projection', 'adapter'):
            getattr(head, side).load_state_dict(getattr(whole.model, side)[i].state_dict())
        alone = ComposerLLM2CLIP(head, LossConfig(loss))
        outputs = alone(batch)
        similarities.append(outputs['image_features'] @ outputs['text_features'].flatten(0, 1).T)
        losses.append(alone.loss(outputs, batch))
    found = features['image_features'] @ features['text_features'].flatten(0, 1).T
    torch.testing.assert_close(found, sum(similarities) / 2)
    torch.testing.assert_close(whole.loss(features, batch), sum(losses) / 2)
    assert (similarities[0] - similarities[1]).abs().max() > 0.1
    with pytest.raises(ConfigError, match='^truncate_dim: '):
        check_truncate_dim(4, config)


def test_visual_projection_begins_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    for init, deviation in (('clip', 256 ** -0.5), ('eva', 2e-5)):
        config = dataclasses.replace(TINY, embed_dim=512, visual_projection='affine', visual_projection_init=init)
        model = LLM2CLIP(config, 8)
        assert model.vision_encoder.width == 256 and model.visual_projection.bias.count_nonzero() == 0
        assert model.visual_projection.weight.std().item() == pytest.approx(deviation, rel=0.02)
        assert model.visual_projection.weight.mean().abs().item() < deviation / 100


def test_logit_scale_alone_is_clamped_to_0_and_ln_100() -> None:
    model, clamp = LLM2CLIP(TINY, 8), ClampLogitScale()
    state: Any = SimpleNamespace(model=model)
    assert clamp.match(Event.BATCH_END, state)
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(model.logit_scale, value)
        torch.nn.init.constant_(model.adapter.projection.bias, value)
        clamp.apply(Event.BATCH_END, state, state)
        assert model.logit_scale.item() == pytest.approx(expected) and model.adapter.projection.bias[0] == value


def test_self_distillation_is_towards_the_model_before_training() -> None:
    vision = dataclasses.replace(TINY.vision, freeze_batch_norm=False)
    model = ComposerLLM2CLIP(LLM2CLIP(dataclasses.replace(TINY, vision=vision), 8),
                             self_distillation=SelfDistillationConfig(instance=3.0, structure=5.0)).train()
    initial = InitialImages(model.model)
    batch = {'pixel_values': torch.randn(4, 3, 32, 32), 'text_embedding': torch.randn(4, 8),
             'text_id': torch.arange(4)}
    targets = initial(batch['pixel_values'])
    torch.testing.assert_close(initial(batch['pixel_values'][:2]), targets[:2])  # in evaluation mode
    outputs = model(batch)
    images = outputs['image_features']
    added = model.loss(outputs, {**batch, 'initial_image_features': targets}) - model.loss(outputs, batch)
    torch.testing.assert_close(added, 3 * instance_loss(images, targets) + 5 * structure_loss(images, targets))
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert torch.equal(initial(batch['pixel_values']), targets)


@pytest.mark.parametrize('captions', [1, 3])
def test_a_loss_of_the_user_gets_all_features_and_has_all_gradients(captions: int) -> None:
    model = ComposerLLM2CLIP(LLM2CLIP(TINY, 8), LossConfig('user_losses:Bilinear', {'dim': 16, 'scale': 3.0}))
    assert model.loss_module is not None
    texts = (4,) if captions == 1 else (4, captions)
    outputs = model({'pixel_values': torch.randn(4, 3, 32, 32), 'text_embedding': torch.randn(*texts, 8)})
    images, texts, scale = (outputs[name] for name in ('image_features', 'text_features', 'logit_scale'))
    module = model.loss_module.loss
    expected = module(images, texts.view(4, captions, 16), scale)
    weights = [*module.parameters(), model.model.adapter.projection.weight]
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.loss(outputs, {})
    assert loss.ndim == 0 and torch.equal(loss, expected) and module.scale.item() == 3
    for found, gradient in zip(torch.autograd.grad(loss, weights, retain_graph=True),
                               torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(found, gradient)


def test_checkpoint_with_other_names_is_loaded_in_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model('test_efficientnet')
    torch.save({f'_x{i}.{name.rsplit(".", 1)[-1]}': v for i, (name, v) in enumerate(source.state_dict().items())},
               tmp_path / 'weights.pth')
    checkpoint = str(tmp_path / 'weights.pth')
    tower = VisionEncoder(VisionConfig('test_efficientnet', checkpoint=checkpoint, remap=True, image_size=32))
    torch.testing.assert_close(tower.trunk.conv_stem.weight, source.conv_stem.weight)


@pytest.mark.parametrize(('adapter', 'projection'), [
    ('residual', 'linear'), ('linear', 'affine'), ('identity', 'identity')])
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
    assert truncate_dims(model, config, None) is config and model.get_text_features(vectors).equal(whole[1])
    shorter = truncate_dims(model, config, 12)
    for found, features in zip((model.get_image_features(pixels), model.get_text_features(vectors)), whole):
        torch.testing.assert_close(found, F.normalize(features[:, :12], dim=-1))
    # The new configuration is that of the model, the old one has not changed.
    again = LLM2CLIP(shorter, 64).eval()
    again.load_state_dict(model.state_dict())
    assert again.get_image_features(pixels).equal(model.get_image_features(pixels))
    assert config == before and shorter.embed_dim == 12


@pytest.mark.parametrize('kind', ['mlp', 'glu'])
def test_alignment_layers_equal_their_formulas(kind: str) -> None:
    """SAIL (arXiv 2412.04616): a LayerNorm, then GELU of a hidden layer, or one gated by ReLU6 of another."""
    torch.manual_seed(0)
    head = make_projection(6, 4, kind, expansion=3).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape))
    state, x = head.state_dict(), torch.randn(5, 6, dtype=torch.float64)

    def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ state[f'{name}.weight'].T + state[f'{name}.bias']

    scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = scaled * state['norm.weight'] + state['norm.bias']
    hidden = linear('up', normed)
    if kind == 'mlp':
        hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2
    else:
        hidden = linear('gate', normed).clamp(0, 6) * hidden
    torch.testing.assert_close(head(x), linear('projection', hidden))
