# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval metrics against a naive ranking, with ties, several texts per image and shared texts."""

import pytest
import torch
import torch.nn.functional as F
from composer.utils import dist
from whole_matrix import MatmulPrecisions

from llm2clip.metrics.retrieval import (
    RetrievalRecall,
    caption_retrieval_accuracy,
    chance,
    rank_both_ways,
    retrieval_ranks,
)


def _naive(image: torch.Tensor, text: torch.Tensor, text_id: torch.Tensor, k: int) -> list[float]:
    """Recall by text and by image as CLIP_benchmark computes it, with the wrong one of equal scores first."""
    ids = text_id.unique().tolist()
    texts = text.flatten(0, 1)[[text_id.flatten().tolist().index(number) for number in ids]]
    right = (text_id[None] == torch.tensor(ids)[:, None, None]).any(-1)
    scores = texts.double() @ image.double().T - 1e-9 * right
    return [100 * of.gather(1, found.topk(k).indices).any(1).double().mean().item()
            for found, of in ((scores, right), (scores.T, right.T))]


@pytest.mark.parametrize('keys', [1, 3])
@pytest.mark.parametrize('kind', ['different', 'shared', 'ties'])
def test_recall_equals_naive(keys: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(keys)
    image = torch.randn(40, 6, generator=generator)
    text = torch.randn(40, keys, 6, generator=generator) + 0.5 * image[:, None]
    text_id = torch.arange(40 * keys).reshape(40, keys)
    if kind == 'shared':
        text_id[20:] = text_id[:20]
        text[20:] = text[:20]
    elif kind == 'ties':  # a few levels of similarity
        image, text = (F.one_hot(side.argmax(-1) % 3, 3).float() for side in (image, text))
    image_of_text = torch.arange(40).repeat_interleave(keys)
    result = rank_both_ways(image, text.flatten(0, 1), image_of_text, text_id.flatten()).recalls()
    for k in (1, 5, 10):
        found = [result[f'{way}_retrieval_recall@{k}'] for way in ('image', 'text')]
        assert found == pytest.approx(_naive(image, text, text_id, k))
    assert result['n_texts'] == (20 if kind == 'shared' else 40) * keys


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_ranks_count_wrong_candidates_to_the_last_one(dtype: torch.dtype) -> None:
    """With more queries than a CPU scores at once, several right candidates, ties and NaN."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1000, 3, generator=generator).round().to(dtype)
    candidates = torch.randn(50, 3, generator=generator).round().to(dtype)
    candidates[7] = torch.nan
    is_right = torch.rand(1000, 50, generator=generator) < 0.05
    is_right[:, 3] |= ~is_right.any(1)
    scores = queries.float() @ candidates.float().T
    expected = []
    for row, right in zip(scores, is_right):
        best = row[right].max()
        expected.append(int((~right & ~(row < best)).sum()))
    ranks = retrieval_ranks(queries, candidates, is_right.nonzero())
    assert ranks.tolist() == expected and ranks.dtype == torch.int64


def test_ties_and_nan_scores_find_nothing() -> None:
    same = torch.ones(5, 3)
    assert caption_retrieval_accuracy(same, same) == 0.0
    assert caption_retrieval_accuracy(torch.eye(5), torch.eye(5) * torch.nan) == 0.0
    assert caption_retrieval_accuracy(torch.eye(5), torch.eye(5)) == 100.0
    # Half of the first captions find theirs, and all of the second ones.
    first = torch.tensor([[1.0, 0.0], [1.0, 0.2]])
    assert caption_retrieval_accuracy(first, torch.eye(2)) == caption_retrieval_accuracy(torch.eye(2), first) == 75.0


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


def test_a_single_rank_gathers_nothing_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.initialize_dist('cpu')
    monkeypatch.setattr(torch.distributed, 'all_gather', lambda *args, **kwargs: pytest.fail('gathers'))
    metric = RetrievalRecall(k=1)
    metric.update(torch.eye(4), torch.eye(4)[:, None], torch.arange(4), torch.arange(1, 5)[:, None])
    assert metric.compute().item() == 100.0


def test_scores_are_in_whole_float32() -> None:
    with MatmulPrecisions() as seen, torch.autocast('cpu', torch.bfloat16):
        caption_retrieval_accuracy(torch.randn(4, 3), torch.randn(4, 3))
    assert len(seen.found) == 2 and set(seen.found) == {('highest', torch.float32)}
