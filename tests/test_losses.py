# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Losses and their gradients against computations written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from llm2clip.losses import all_gather, clip_loss, ignored_candidates, info_nce


def _unit(n: int, d: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_clip_loss_and_gradients_equal_a_loop() -> None:
    image = _unit(7, 5, 0).float().requires_grad_()
    text = _unit(7, 5, 1).float().requires_grad_()
    scale = torch.tensor([2.0], requires_grad=True)
    clip_loss(image, text, scale).backward()

    a, b, s = (x.detach().double().requires_grad_() for x in (image, text, scale))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(7):
        row = torch.stack([s[0].exp() * (a[i] * b[j]).sum() for j in range(7)])
        column = torch.stack([s[0].exp() * (a[j] * b[i]).sum() for j in range(7)])
        total = total - row[i] + row.logsumexp(0) - column[i] + column.logsumexp(0)
    (total / 14).backward()
    assert clip_loss(image, text, scale).item() == pytest.approx((total / 14).item(), rel=1e-6)
    for found, expected in ((image, a), (text, b), (scale, s)):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


def test_clip_loss_of_a_perfect_model_is_near_zero_and_of_a_constant_one_is_log_n() -> None:
    eye = torch.eye(6)
    assert clip_loss(eye, eye, torch.tensor([math.log(100.0)])).item() < 1e-6
    assert clip_loss(torch.ones(6, 1), torch.ones(6, 1), torch.zeros(1)).item() == pytest.approx(math.log(6))


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('negatives', [0, 4])
def test_info_nce_equals_a_loop(symmetric: bool, negatives: int) -> None:
    query, positive = 3 * _unit(6, 8, 0), 2 * _unit(6, 8, 1)
    negative = _unit(negatives, 8, 2) if negatives else None
    cos = torch.nn.functional.cosine_similarity
    total = 0.0
    for i in range(6):
        scores = [50 * cos(query[i], p, dim=0).item() for p in positive]
        others = scores + [50 * cos(query[i], n, dim=0).item() for n in (negative if negative is not None else [])]
        forward = math.log(sum(math.exp(s - scores[i]) for s in others))
        back = [50 * cos(positive[i], q, dim=0).item() for q in query]
        backward = math.log(sum(math.exp(s - back[i]) for s in back))
        total += (forward + backward) / 2 if symmetric else forward
    loss = info_nce(query, positive, negative, scale=50.0, symmetric=symmetric)
    assert loss.item() == pytest.approx(total / 6, rel=1e-4)


def test_gather_on_one_process_is_the_identity() -> None:
    x = torch.ones(2, 3)
    assert all_gather(x) is x


def test_equal_texts_are_not_each_others_negatives() -> None:
    a, b, c, d, e, f, x, y = range(1, 9)
    query, positive = torch.tensor([a, b, a, d]), torch.tensor([b, c, e, f])
    # Pairs (a, b), (b, c) and (a, e) share texts with one another in a chain; (d, f) is alone.
    expected = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(ignored_candidates(query, positive), expected)
    assert not ignored_candidates(query, positive, equal_texts=False).any()
    negative = torch.tensor([x, b, 0, f])
    hard = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(ignored_candidates(query, positive, negative), torch.cat([expected, hard], 1))
    missing = torch.zeros(4, 8, dtype=torch.bool)
    missing[:, 6] = True
    assert torch.equal(ignored_candidates(query, positive, negative, equal_texts=False), missing)


@pytest.mark.parametrize('symmetric', [False, True])
def test_ignored_candidates_are_as_if_absent(symmetric: bool) -> None:
    query, positive, negative = _unit(4, 8, 0), _unit(4, 8, 1), _unit(4, 8, 2)
    ignored = torch.zeros(4, 8, dtype=torch.bool)
    ignored[0, 1] = ignored[1, 0] = ignored[2, 5] = True
    total = 0.0
    for i in range(4):
        logits = 50 * (torch.cat([positive, negative]) @ query[i])
        total += logits[~ignored[i]].logsumexp(0) - logits[i]
        if symmetric:
            back = 50 * (query @ positive[i])
            total += back[~ignored[:, i]].logsumexp(0) - back[i]
    loss = info_nce(query, positive, negative, scale=50.0, symmetric=symmetric, ignored=ignored)
    assert loss.item() == pytest.approx(total.item() / (8 if symmetric else 4), rel=1e-4)
