# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Drawing captions: reproducible, in proportion, and among those that a sample has."""

from collections import Counter

import pytest

from llm2clip.config import CaptionPairConfig
from llm2clip.data.captions import draw_captions, draw_pair, sample_seed

WEIGHTS = {'a': 1.0, 'b': 3.0, 'c': 0.5}


def _sample(**texts: str) -> dict[str, str]:
    return {'sample_id': 'x', **{f'caption.{key}': text for key, text in texts.items()}}


def test_an_existing_caption_is_drawn_by_its_weight() -> None:
    sample = _sample(a='1', b=' ', c='3')
    counts = Counter(draw_captions(sample, WEIGHTS, 1, sample_seed(0, 0, str(i)))[0][0] for i in range(3000))
    assert set(counts) == {'a', 'c'} and 0.63 < counts['a'] / 3000 < 0.70


def test_several_captions_are_drawn_without_replacement() -> None:
    sample, drawn_pairs = _sample(a='1', b='2', c='3'), Counter()
    for i in range(3000):
        seed = sample_seed(0, 0, str(i))
        drawn = draw_captions(sample, WEIGHTS, 3, seed)
        assert sorted(drawn) == [('a', '1'), ('b', '2'), ('c', '3')]
        assert all(drawn[:n] == draw_captions(sample, WEIGHTS, n, seed) for n in (1, 2))
        drawn_pairs[drawn[0][0] + drawn[1][0]] += 1
    assert 0.62 < drawn_pairs['ba'] / (drawn_pairs['ba'] + drawn_pairs['bc']) < 0.71  # by 1.0 and 0.5
    assert 0.81 < drawn_pairs['ab'] / (drawn_pairs['ab'] + drawn_pairs['ac']) < 0.90  # by 3.0 and 0.5
    keys = [key for key, _ in draw_captions(_sample(a='1', b='', c='3'), WEIGHTS, 5, 7)]
    assert sorted(keys[:2]) == sorted(keys[2:4]) == ['a', 'c'] and keys[4] in ('a', 'c')


def test_a_sample_without_any_of_the_captions_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"sample 'x' has none of the captions a, b, c, but d, e; draw from .*"
                                         r"require_any_caption=\[a,b,c\]"):
        draw_captions(_sample(a='', b='', c=' ', d='4', e='5'), WEIGHTS, 1, 0)
    with pytest.raises(ValueError, match="sample 'x' has none of the captions a, b, but c; draw from"):
        draw_pair(_sample(a='', b='', c='3'), [CaptionPairConfig(['a'], ['b']), CaptionPairConfig(['b'], ['a'])], 0)


PAIRS = [CaptionPairConfig(['a', 'b'], ['b', 'c'], weight=2.0),
         CaptionPairConfig(['c'], ['a', 'b'], instruction='i')]


def test_with_gaps_a_pair_is_two_captions_that_are_there() -> None:
    drawn = {draw_pair(_sample(a='1', b='', c='3'), PAIRS, sample_seed(0, 0, str(i)))[1:3] for i in range(100)}
    assert drawn == {('1', '3'), ('3', '1')}
    # Only the second direction has two captions.
    drawn = [draw_pair(_sample(a='', b='2', c='3'), [PAIRS[1], CaptionPairConfig(['a'], ['b'])],
                       sample_seed(0, 0, str(i))) for i in range(20)]
    assert {row[1:] for row in drawn} == {('3', '2', 'b')} and drawn[0].direction.instruction == 'i'


def test_query_and_positive_are_drawn_independently() -> None:
    pairs = [CaptionPairConfig(['a', 'b'], ['c', 'd'])]
    drawn = Counter(draw_pair(_sample(a='1', b='2', c='3', d='4'), pairs, sample_seed(0, 0, str(i)))[1:3]
                    for i in range(1000))
    assert len(drawn) == 4 and min(drawn.values()) > 200


def test_a_caption_is_not_its_own_positive_if_the_sample_has_another() -> None:
    pairs = [CaptionPairConfig(['a', 'b', 'c'], ['a', 'b', 'c'])]
    drawn = {draw_pair(_sample(a='1', b='2', c=''), pairs, sample_seed(0, 0, str(i)))[1:3] for i in range(100)}
    assert drawn == {('1', '2'), ('2', '1')}


def test_a_single_caption_is_paired_with_itself() -> None:
    drawn = [draw_pair(_sample(a='', b='', c='3'), PAIRS, sample_seed(0, 0, str(i))) for i in range(200)]
    assert {row[1:3] for row in drawn} == {('3', '3')}
    # In both directions that have it, by their weights.
    counts = Counter(row.direction.weight for row in drawn)
    assert set(counts) == {1.0, 2.0} and 0.5 < counts[2.0] / 200 < 0.8
    pairs = [CaptionPairConfig(['a', 'b'], None)]
    drawn = {draw_pair(_sample(a='1', b='2', c='3'), pairs, sample_seed(0, 0, str(i)))[1:] for i in range(20)}
    assert drawn == {('1', '1', 'a'), ('2', '2', 'b')}
