# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Two ranks, each with the rows of the loss that are its own, and FSDP2 in bfloat16 around a float32 loss."""

from typing import Any

import pytest
import torch
from launched import Launched, finish
from two_ranks import BIAS, N
from whole_matrix import CASES, sample, whole_matrix

pytestmark = pytest.mark.dist


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    out = tmp_path_factory.mktemp('two_ranks') / 'results.pt'
    log = out.with_suffix('.log')
    finish(Launched(['tests/two_ranks.py', str(out)], log, 2), log)
    return torch.load(out)


@pytest.mark.parametrize('block_size', [0, 4])
@pytest.mark.parametrize('case', CASES)
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(
    found: dict[Any, Any], case: str, block_size: int
) -> None:
    leaves, ids = sample(case, N)
    whole = whole_matrix(case, leaves, ids)
    whole.backward()
    result = found[case, block_size]
    assert result['value'] == pytest.approx(whole.item(), rel=1e-6)
    expected = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for gradient, other in zip(result['gradients'], expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


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
