# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval metrics against a naive ranking, with ties, several texts per image and shared texts."""

import pytest
import torch
from whole_matrix import MatmulPrecisions

from llm2clip.metrics.retrieval import (
    CaptionRetrievalAccuracy,
    RetrievalRecall,
    caption_retrieval_accuracy,
    chance,
    rank_both_ways,
    retrieval_ranks,
)


def _naive(image: torch.Tensor, text: torch.Tensor, text_id: torch.Tensor, k: int) -> tuple[float, float]:
    """Recall with one row per text, sorting scores one query at a time; no ties in the input."""
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
    image_of_text = torch.arange(40).repeat_interleave(keys)
    result = rank_both_ways(image, text.flatten(0, 1), image_of_text, text_id.flatten()).recalls()
    for k in (1, 5):
        by_text, by_image = _naive(image, text, text_id, k)
        assert result[f'image_retrieval_recall@{k}'] == pytest.approx(by_text)
        assert result[f'text_retrieval_recall@{k}'] == pytest.approx(by_image)
    assert result['n_texts'] == (20 if shared else 40) * keys


def _clip_benchmark(scores: torch.Tensor, positive: torch.Tensor, k: int) -> float:
    """Recall as CLIP_benchmark defines it: a hit if one of the k best by `torch.topk` is positive."""
    return 100 * positive.gather(1, scores.topk(k, dim=1).indices).any(1).float().mean().item()


def test_recall_of_ties_is_the_least_of_clip_benchmark() -> None:
    # Three levels of similarity, so that most ranks are ties; there topk's order is anybody's guess, and ours the order
    # in which the wrong ones come first.  A wrong one that ties is put first by a tiny bonus.
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.one_hot(torch.randint(0, 3, (60,), generator=generator), 3).float()
                   for _ in range(2))
    text = text + 0.5 * image
    right = torch.eye(60, dtype=torch.bool)
    result = rank_both_ways(image, text, torch.arange(60)).recalls()
    for way, scores in (('image', text @ image.T), ('text', image @ text.T)):
        for k in (1, 5, 10):
            found = result[f'{way}_retrieval_recall@{k}']
            assert found == pytest.approx(_clip_benchmark(scores - 1e-3 * right, right, k))
            assert found <= _clip_benchmark(scores, right, k)


def test_chunks_do_not_matter() -> None:
    x, y = torch.randn(33, 4), torch.randn(33, 4)
    right = torch.arange(33)[:, None].expand(-1, 2)
    assert torch.equal(retrieval_ranks(x, y, right, chunk=5), retrieval_ranks(x, y, right, chunk=100))


def test_ties_and_nan_scores_find_nothing() -> None:
    same = torch.ones(5, 3)
    assert caption_retrieval_accuracy(same, same) == 0.0
    assert caption_retrieval_accuracy(torch.eye(5), torch.eye(5) * torch.nan) == 0.0
    assert caption_retrieval_accuracy(torch.eye(5), torch.eye(5)) == 100.0


def test_chance_is_that_of_random_rankings() -> None:
    assert chance(torch.tensor([1, 1]), 100, 10) == pytest.approx(10.0)
    assert chance(torch.tensor([2]), 4, 2) == pytest.approx(100 * (1 - 2 / 4 * 1 / 3))


def test_absent_texts_are_neither_queries_nor_candidates() -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(30, 6, generator=generator)
    text = torch.randn(30, 4, 6, generator=generator) + 0.5 * image[:, None]
    there = torch.rand(30, 4, generator=generator) < 0.5
    there[7] = False
    # Were they candidates, these would be the first hit of every image.
    text[~there] = 100 * image.mean(0)
    text_id = torch.where(there, 1 + torch.arange(120).reshape(30, 4), 0)
    metric = RetrievalRecall(k=5)
    metric.update(image, text, torch.arange(30), text_id)
    kept = there.any(1)
    image, there = image[kept], there[kept]
    expected = rank_both_ways(image, text[kept][there], there.nonzero()[:, 0]).recalls()
    assert expected['n_images'] == kept.sum() < 30 and expected['n_texts'] == there.sum()
    assert metric.compute().item() == pytest.approx(
        (expected['image_retrieval_recall@5'] + expected['text_retrieval_recall@5']) / 2)
    metric.reset()
    metric.update(image, text[kept], torch.arange(len(image)), torch.zeros_like(text_id[kept]))
    with pytest.raises(ValueError, match='no image has a caption'):
        metric.compute()


def test_metrics_count_a_repeated_sample_once() -> None:
    image, text = torch.eye(4), torch.eye(4)[:, None]
    metric = RetrievalRecall(k=1)
    ids = torch.arange(1, 5)[:, None]
    metric.update(image[:3], text[:3], torch.tensor([0, 1, 2]), ids[:3])
    metric.update(image[2:], text[2:], torch.tensor([2, 3]), ids[2:])
    assert metric.compute().item() == 100.0
    cra = CaptionRetrievalAccuracy()
    cra.update(torch.eye(3), torch.eye(3), torch.arange(3), torch.ones(3))
    cra.update(torch.eye(3)[:1], torch.eye(3)[:1], torch.tensor([0]), torch.ones(1))
    assert cra.compute().item() == 100.0


def test_scores_are_in_whole_float32() -> None:
    """Under autocast and where TF32 is allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        with MatmulPrecisions() as seen, torch.autocast('cpu', torch.bfloat16):
            caption_retrieval_accuracy(torch.randn(4, 3), torch.randn(4, 3))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen.found) == 2 and set(seen.found) == {('highest', torch.float32)}
