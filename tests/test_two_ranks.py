# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Two ranks, each with the rows of the loss that are its own, and FSDP2 in bfloat16 around a float32 loss.

As a script, on two ranks, this file writes what they compute."""

import sys
from functools import partial
from typing import Any, Optional

import pytest
import torch
import torch.distributed
from composer.core import Precision
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.utils import dist, get_device
from composer.utils.parallelism import FSDP2Config
from launched import Launched, finish
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from whole_matrix import CASES, LEAVES, assert_close, own_rows, sample, whole_matrix

from llm2clip.config import AdapterConfig, LossConfig, ModelConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.sharding import set_up_units

pytestmark = pytest.mark.dist
N, BIAS = 12, -10.1


def loss_of_rows(case: str, block_size: int) -> dict[str, Any]:
    """The mean of the ranks' losses and, per leaf, the gradient that training with DDP would get."""
    share = N // dist.get_world_size()
    rows = slice(dist.get_global_rank() * share, (dist.get_global_rank() + 1) * share)
    leaves, ids = sample(case, N)
    leaves = [leaf.detach()[rows if leaf.ndim > 1 else slice(None)].requires_grad_() for leaf in leaves]
    value = own_rows(case, leaves, ids[rows], block_size or None)
    value.backward()
    ranks = dist.all_gather_object((value.item(), [leaf.grad for leaf in leaves]))
    gradients = {}
    for name, *parts in zip(LEAVES, *(gradients for _, gradients in ranks), strict=True):
        if parts[0] is not None:
            gradients[name] = torch.cat(parts) / len(ranks) if parts[0].ndim > 1 else torch.stack(parts).mean(0)
    return {'value': sum(value for value, _ in ranks) / len(ranks), 'gradients': gradients}


def sharded_in_bfloat16(loss: LossConfig, logit_bias: Optional[float]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and a batch."""
    config = ModelConfig(VisionConfig('test_vit', False, image_size=32), AdapterConfig(depth=1), embed_dim=16,
                         logit_scale=100.0, logit_bias=logit_bias)
    model = ComposerLLM2CLIP(LLM2CLIP(config, 8), loss)
    batch = {'index': torch.arange(4), 'pixel_values': torch.randn(4, 3, 32, 32), 'text_embedding': torch.randn(4, 8)}
    sharding = FSDP2Config(device_mesh=init_device_mesh('cpu', (dist.get_world_size(),)))
    prepare_fully_shard(model, sharding, Precision.AMP_BF16, generate_composer_model_policy(model))
    set_up_units(model)
    return model, batch


def loss_of_the_user_in_bfloat16() -> dict[str, torch.Tensor]:
    """A matrix of the loss, as the loss gets it and as it is."""
    torch.manual_seed(0)
    model, batch = sharded_in_bfloat16(LossConfig('user_losses:Bilinear', {'dim': 16}), None)
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(batch)
        loss = model.loss(outputs, batch)
    loss.backward()
    matrix = model.loss_module.loss.matrix.weight
    return {'loss': loss.detach(), 'output': outputs['loss.matrix.weight'].detach(),
            'matrix': matrix.full_tensor().detach(), 'gradient': matrix.grad.full_tensor()}


def images_in_bfloat16() -> dict[str, Any]:
    """Take a sharded step; return scalars with their gradients, and inputs and types of gathered weights of modules."""
    torch.manual_seed(0)
    model, batch = sharded_in_bfloat16(LossConfig('siglip'), BIAS)
    weights: dict[str, set[torch.dtype]] = {}
    inputs: dict[str, torch.Tensor] = {}

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str) -> None:
        weights[name] = {value.dtype for value in module.parameters() if not isinstance(value, DTensor)}
        inputs[name] = args[0].detach()

    for name, path in (('adapter', 'model.adapter'), ('block', 'model.vision_encoder.trunk.blocks.1')):
        model.get_submodule(path).register_forward_pre_hook(partial(watch, name=name))
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(batch)
        loss = model.loss(outputs, batch)
    loss.backward()
    scalars = ('logit_scale', 'logit_bias')
    return {'weights': weights, 'inputs': inputs, 'vectors': batch['text_embedding'], 'loss': loss.detach(),
            'outputs': {name: outputs[name].detach() for name in scalars},
            'gradients': {name: model.get_parameter(f'model.{name}').grad.full_tensor() for name in scalars}}


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    out = tmp_path_factory.mktemp('two_ranks') / 'results.pt'
    log = out.with_suffix('.log')
    finish(Launched([__file__, str(out)], log, 2), log)
    return torch.load(out)


@pytest.mark.parametrize('block_size', [0, 4])
@pytest.mark.parametrize('case', CASES)
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(found: dict[Any, Any], case: str, block_size: int) -> None:
    leaves, ids = sample(case, N)
    whole = whole_matrix(case, leaves, ids)
    whole.backward()
    result = found[case, block_size]
    assert result['value'] == pytest.approx(whole.item(), rel=1e-6)
    expected = {name: leaf.grad for name, leaf in zip(LEAVES, leaves, strict=True) if leaf.grad is not None}
    assert result['gradients'].keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(result['gradients'][name], gradient, name, rtol=1e-5, atol=1e-6)


def test_temperature_bias_and_vectors_are_not_rounded_by_fsdp(found: dict[Any, Any]) -> None:
    """In bfloat16, a temperature of 100 would be 98.9 and a bias of -10.1 be -10.125."""
    images = found['images']
    logit_scale, gradient = images['outputs']['logit_scale'], images['gradients']['logit_scale']
    assert logit_scale.dtype == images['loss'].dtype == gradient.dtype == torch.float32 and gradient.item() != 0
    assert logit_scale.exp().item() == pytest.approx(100, rel=1e-6)
    assert images['outputs']['logit_bias'].item() == pytest.approx(BIAS, rel=1e-6)
    # Gathered in float32, the gradient of the bias has more than bfloat16's bits.
    gradient = images['gradients']['logit_bias']
    assert gradient.to(torch.bfloat16).float() != gradient
    assert torch.equal(images['inputs']['adapter'], images['vectors'])
    # The rest is in bfloat16, as asked for.
    assert images['weights'] == {'adapter': {torch.bfloat16}, 'block': {torch.bfloat16}}


def test_parameters_of_a_loss_are_not_rounded_by_fsdp(found: dict[Any, Any]) -> None:
    result = found['loss of the user']
    assert torch.equal(result['output'], result['matrix'].flatten())
    assert result['loss'].dtype == torch.float32 and not torch.equal(result['matrix'].bfloat16(), result['matrix'])
    assert not torch.equal(result['gradient'].bfloat16(), result['gradient'])


if __name__ == '__main__':
    dist.initialize_dist(get_device('cpu'), 120)
    results: dict[Any, Any] = {(case, block): loss_of_rows(case, block) for case in CASES for block in (0, 4)}
    results['images'] = images_in_bfloat16()
    results['loss of the user'] = loss_of_the_user_in_bfloat16()
    if dist.get_global_rank() == 0:
        torch.save(results, sys.argv[1])
