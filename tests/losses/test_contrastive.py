# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Losses and their gradients against computations written out by hand."""

import math
from functools import partial
from typing import Optional

import pytest
import torch
from whole_matrix import CASES, MatmulPrecisions, own_rows, sample, unit, whole_matrix

from llm2clip.losses.contrastive import clip_loss, ignored_candidates, info_nce, siglip_loss
from llm2clip.losses.gather import all_gather


def test_clip_loss_and_gradients_equal_a_loop() -> None:
    image = unit(7, 5, 0).float().requires_grad_()
    text = unit(7, 5, 1).float().requires_grad_()
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


def test_label_smoothing_and_equal_texts_in_clip_loss_equal_a_loop() -> None:
    (image, text, scale, _), ids = sample()
    logits = (scale.exp() * image @ text.T).double()
    total = 0.0
    for scores in (logits, logits.T):
        for i in range(11):
            kept = [j for j in range(11) if j == i or ids[j] != ids[i]]
            log_softmax = scores[i, kept].log_softmax(0)
            target = torch.tensor([0.9 * (j == i) + 0.1 / len(kept) for j in kept])
            total -= float((log_softmax * target).sum())
    assert clip_loss(image, text, scale, 0.1, ids).item() == pytest.approx(total / 22, rel=1e-5)
    distinct = torch.arange(11)
    torch.testing.assert_close(clip_loss(image, text, scale, 0.1, distinct), clip_loss(image, text, scale, 0.1))


@pytest.mark.parametrize('equal_texts', [False, True])
def test_siglip_loss_equals_a_loop(equal_texts: bool) -> None:
    (image, text, scale, bias), ids = sample()
    total = 0.0
    for i in range(11):
        for j in range(11):
            if i == j or not equal_texts or ids[i] != ids[j]:
                z = 1 if i == j else -1
                logit = z * (math.exp(2.0) * float(image[i] @ text[j]) - 3.0)
                total += math.log1p(math.exp(-logit))
    found = siglip_loss(image, text, scale, bias, ids if equal_texts else None)
    assert found.item() == pytest.approx(total / 11, rel=1e-5)


@pytest.mark.parametrize('block_size', [1, 4, 11, 100, None])
@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_in_blocks_are_those_of_the_whole_matrix(case: str, block_size: Optional[int]) -> None:
    """Which autograd differentiates."""
    results = []
    for loss in (whole_matrix, partial(own_rows, block_size=block_size)):
        leaves, ids = sample(case)
        value = loss(case, leaves, ids)
        (3 * value).backward()
        results.append([value, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', CASES)
def test_losses_are_in_whole_float32_forward_and_backward(case: str) -> None:
    """Under autocast and where TF32 is allowed, as Composer allows it on GPUs."""
    leaves, ids = sample(case)
    expected = own_rows(case, leaves, ids)
    (before := torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision('high'))
    try:
        with MatmulPrecisions() as seen, torch.autocast('cpu', torch.bfloat16):
            value = own_rows(case, leaves, ids)
            value.backward()
        assert torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision(before)
    assert value.item() == expected.item()
    assert len(seen.found) >= 3 and set(seen.found) == {('highest', torch.float32)}


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('negatives', [0, 4])
def test_info_nce_equals_a_loop(symmetric: bool, negatives: int) -> None:
    query, positive = 3 * unit(6, 8, 0), 2 * unit(6, 8, 1)
    negative = unit(negatives, 8, 2) if negatives else None
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
    query, positive, negative = unit(4, 8, 0), unit(4, 8, 1), unit(4, 8, 2)
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
