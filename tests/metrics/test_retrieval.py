# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval metrics against a naive ranking, with ties, several texts an image and shared texts."""

import pytest
import torch

from llm2clip.metrics.retrieval import (
    CaptionRetrievalAccuracy,
    RetrievalRecall,
    caption_retrieval_accuracy,
    chance,
    retrieval_ranks,
    retrieval_recall,
)


def _naive(image: torch.Tensor, text: torch.Tensor, text_id: torch.Tensor, k: int) -> tuple[float, float]:
    """Recall with every text a row, sorting scores one query at a time; no ties in the input."""
    n, keys = text_id.shape
    groups: dict[int, list[int]] = {}
    first: dict[int, torch.Tensor] = {}
    for i in range(n):
        for j in range(keys):
            groups.setdefault(int(text_id[i, j]), []).append(i)
            first.setdefault(int(text_id[i, j]), text[i, j])
    ids = list(first)
    by_text = [bool(set((image @ first[t]).argsort(descending=True)[:k].tolist()) & set(groups[t])) for t in ids]
    by_image = [any(i in groups[ids[j]] for j in
                    torch.stack([image[i] @ first[t] for t in ids]).argsort(descending=True)[:k].tolist())
                for i in range(n)]
    return 100 * sum(by_text) / len(by_text), 100 * sum(by_image) / n


@pytest.mark.parametrize('keys', [1, 3])
@pytest.mark.parametrize('shared', [False, True])
def test_recall_equals_naive(keys: int, shared: bool) -> None:
    generator = torch.Generator().manual_seed(keys)
    image = torch.randn(40, 6, generator=generator)
    text = torch.randn(40, keys, 6, generator=generator) + 0.5 * image[:, None]
    text_id = torch.arange(40 * keys).reshape(40, keys)
    if shared:
        text_id[20:] = text_id[:20]
        text[20:] = text[:20]
    result = retrieval_recall(image, text, text_id, ks=(1, 5))
    for k in (1, 5):
        by_text, by_image = _naive(image, text, text_id, k)
        assert result[f'image_retrieval_recall@{k}'] == pytest.approx(by_text)
        assert result[f'text_retrieval_recall@{k}'] == pytest.approx(by_image)
    assert result['n_texts'] == (20 if shared else 40) * keys


def test_chunks_do_not_matter() -> None:
    x, y = torch.randn(33, 4), torch.randn(33, 4)
    right = torch.arange(33)[:, None].expand(-1, 2)
    assert torch.equal(retrieval_ranks(x, y, right, chunk=5), retrieval_ranks(x, y, right, chunk=100))


def test_a_tie_is_not_a_hit() -> None:
    same = torch.ones(5, 3)
    assert caption_retrieval_accuracy(same, same) == 0.0
    assert caption_retrieval_accuracy(torch.eye(5), torch.eye(5)) == 100.0


def test_query_without_right_candidate_is_an_error() -> None:
    with pytest.raises(ValueError, match='query 1'):
        retrieval_ranks(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([[0, 0]]))


def test_chance_is_that_of_random_rankings() -> None:
    assert chance(torch.tensor([1, 1]), 100, 10) == pytest.approx(10.0)
    assert chance(torch.tensor([2]), 4, 2) == pytest.approx(100 * (1 - 2 / 4 * 1 / 3))


def test_metrics_count_a_repeated_sample_once() -> None:
    image, text = torch.eye(4), torch.eye(4)[:, None]
    metric = RetrievalRecall(k=1)
    ids = torch.arange(4)[:, None]
    metric.update(image[:3], text[:3], torch.tensor([0, 1, 2]), ids[:3])
    metric.update(image[2:], text[2:], torch.tensor([2, 3]), ids[2:])
    assert metric.compute().item() == 100.0
    cra = CaptionRetrievalAccuracy()
    cra.update(torch.eye(3), torch.eye(3), torch.arange(3))
    cra.update(torch.eye(3)[:1], torch.eye(3)[:1], torch.tensor([0]))
    assert cra.compute().item() == 100.0
