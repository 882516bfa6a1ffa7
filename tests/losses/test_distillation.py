# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What holds features to others, against torch's own distances."""

from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from whole_matrix import MatmulPrecisions, assert_close, unit

from llm2clip.losses.distillation import instance_loss, structure_loss
from llm2clip.models.inherited_adapter import ComposerInheritance

N = 9


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    return unit(N, 6, 0).float().requires_grad_(), unit(N, 4, 1).float()


@pytest.mark.parametrize('block_size', [None, 1, 4, 100])
def test_structure_loss_and_gradient_equal_those_of_all_pairs(block_size: Optional[int]) -> None:
    features, targets = _features()
    loss = structure_loss(features, targets, block_size)
    (3 * loss).backward()
    plain = features.detach().double().requires_grad_()
    expected = F.smooth_l1_loss(F.pdist(plain), F.pdist(targets.double()))
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # Along the features, where normalised ones do not move, the two differ.
    tangent = torch.eye(6, dtype=torch.float64) - plain.detach()[:, :, None] * plain.detach()[:, None]
    found, wanted = ((tangent @ gradient[:, :, None])[..., 0] for gradient in (features.grad.double(), plain.grad))
    assert_close(found, wanted, 'features', rtol=1e-5, atol=1e-7)


def test_equal_features_have_no_gradient() -> None:
    features, targets = _features()
    equal = features.detach()[:1].expand(N, -1).clone().requires_grad_()
    structure_loss(equal, targets).backward()
    assert equal.grad is not None and not equal.grad.any()


@pytest.mark.parametrize('block_size', [None, 4])
def test_uncounted_samples_do_not_change_the_losses(block_size: Optional[int]) -> None:
    features, targets = _features()
    counted = torch.tensor([True, False, True, True, False, True, True, True, False])
    targets = torch.nn.functional.pad(targets, (0, 2))
    loss = structure_loss(features, targets, block_size, counted) + instance_loss(features, targets, counted)
    loss.backward()
    some = features.detach()[counted].requires_grad_()
    expected = structure_loss(some, targets[counted]) + instance_loss(some, targets[counted])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(features.grad[counted], some.grad, 'features', rtol=1e-5, atol=1e-7)
    assert not features.grad[~counted].any()
    nothing = torch.zeros(N, dtype=torch.bool)
    assert structure_loss(features, targets, block_size, nothing) == instance_loss(features, targets, nothing) == 0


def test_inheritance_weighs_the_losses_of_what_counts() -> None:
    model = ComposerInheritance(torch.nn.Identity(), instance=3.0, structure=5.0)
    features = torch.eye(3)
    targets = torch.tensor([[2.0, 0, 0], [1, 2, 0], [3, 1, 0]])
    counted = torch.tensor([True, True, False])
    batch = {'index': torch.arange(3), 'target': targets, 'counted': counted}
    outputs = {'text_features': features}
    unit_targets = F.normalize(targets)
    distances = (features - unit_targets)[counted].square().sum(1)
    expected = 3 * distances.mean() + 5 * structure_loss(features, unit_targets, counted=counted)
    torch.testing.assert_close(model.loss(outputs, batch), expected)
    metric = model.val_metrics['retrieval_recall@10']
    metric.k = 1
    model.update_metric(batch, outputs, metric)
    assert metric.compute() == 100


def test_distances_are_in_whole_float32() -> None:
    features, targets = _features()
    expected = structure_loss(features, targets).item()
    with MatmulPrecisions() as seen, torch.autocast('cpu', torch.bfloat16):
        assert structure_loss(features, targets).item() == expected
    assert set(seen.found) == {('highest', torch.float32)}
