# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Losses and their gradients against computations written out by hand."""

from functools import partial
from typing import Optional

import pytest
import torch
from whole_matrix import CASES, LEAVES, MatmulPrecisions, assert_close, own_rows, sample, whole_matrix

from llm2clip.losses.contrastive import ignored_candidates


@pytest.mark.parametrize('block_size', [1, 4, 11, 100, None])
@pytest.mark.parametrize('case', CASES)
def test_blocks_give_values_and_gradients_of_the_whole_matrix(case: str, block_size: Optional[int]) -> None:
    results = []
    for loss in (whole_matrix, partial(own_rows, block_size=block_size)):
        leaves, ids = sample(case)
        value = loss(case, leaves, ids)
        (3 * value).backward()
        gradients = {name: leaf.grad for name, leaf in zip(LEAVES, leaves, strict=True) if leaf.grad is not None}
        results.append({'value': value, **gradients})
    assert results[1].keys() == results[0].keys()
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, name, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', CASES)
def test_losses_are_in_whole_float32_forward_and_backward(case: str) -> None:
    leaves, ids = sample(case)
    expected = own_rows(case, leaves, ids)
    with MatmulPrecisions() as seen, torch.autocast('cpu', torch.bfloat16):
        value = own_rows(case, leaves, ids)
        value.backward()
    assert value.item() == expected.item()
    assert len(seen.found) >= 3 and set(seen.found) == {('highest', torch.float32)}


def test_equal_texts_are_not_each_others_negatives() -> None:
    a, b, c, d, e, f, x, y = range(1, 9)
    query, positive = torch.tensor([a, b, a, d, y]), torch.tensor([b, c, e, f, f])
    # Pairs (a, b), (b, c) and (a, e) share texts with one another in a chain; (d, f) and (y, f) share their positive.
    expected = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]],
                            dtype=torch.bool)
    assert torch.equal(ignored_candidates(query, positive), expected)
    assert not ignored_candidates(query, positive, equal_texts=False).any()
    negative = torch.tensor([x, b, 0, f])
    hard = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(ignored_candidates(query, positive, negative), torch.cat([expected, hard], 1))
    missing = torch.zeros(5, 9, dtype=torch.bool)
    missing[:, 7] = True
    assert torch.equal(ignored_candidates(query, positive, negative, equal_texts=False), missing)
