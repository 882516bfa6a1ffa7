# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Filters, subsets and held-out samples, which are the same for every source."""

from typing import Any

import pytest
import xxhash
from refusals import refused_at

from llm2clip.data.convert.samples import Dropped, Selection, is_in_holdout, split_holdout
from llm2clip.errors import ConfigError, FileError


@pytest.mark.parametrize(('limits', 'kept', 'left_out'), [
    ({'min': 5}, [5, 5.5, '5', '1e9', 10**30], [4, '4.99', -1, float('-inf')]),
    ({'max': 0.3}, [0.3, '-7', 0], [0.31, '1', float('inf')]),
    ({'min': 0, 'max': 1}, [0, 1, '0.5'], [-0.1, 1.1]),
    ({'values': ['en', 'de']}, ['en', 'de'], ['fr', 'EN', 'end', 1]),
    ({'values': [False, 3]}, [False, 'false', 3, '3', 3.0], [True, 0, 'False', 3.5])])
def test_a_filter_keeps_values_and_counts_the_others(
    limits: dict[str, Any], kept: list[Any], left_out: list[Any]
) -> None:
    selection, dropped = Selection({'x': limits}), Dropped()
    assert not any(selection.filters_out({'x': value}, 's', dropped) for value in kept) and not dropped.filtered
    blank = [None, '', ' ', *([float('nan'), 'nan'] if 'values' not in limits else [])]
    assert all(selection.filters_out({'x': value}, 's', dropped) for value in [*left_out, *blank])
    assert dropped.filtered == {'filter x': len(left_out) + len(blank)}


@pytest.mark.parametrize(('limits', 'key'), [
    ({'least': 1}, '.least'), ({'max': float('nan')}, '.max'), ({'min': 2, 'values': ['a']}, ''),
    ({'min': 2, 'max': 1}, ''), ({}, '')])
def test_a_filter_that_cannot_be_is_refused(limits: dict[str, Any], key: str) -> None:
    with refused_at(f'source.filters.x{key}'):
        Selection({'x': limits})


def test_a_value_that_is_no_number_or_missing_is_named() -> None:
    selection = Selection({'x': {'min': 1}})
    with pytest.raises(FileError, match=r"t\.csv:3: 'x': .*'wide'.*, expected a number"):
        selection.filters_out({'x': 'wide'}, 't.csv:3', Dropped())
    with pytest.raises(ConfigError, match=r"t\.csv:3 has no 'x'; it has y"):
        selection.filters_out({'y': 1}, 't.csv:3', Dropped())


def test_the_subset_depends_on_the_ids_alone() -> None:
    ids = [f's{i}' for i in range(4000)]

    def kept(share: float, seed: int = 0) -> set[str]:
        selection = Selection(share=share, seed=seed)
        return {name for name in ids if not selection.samples_out(name, Dropped())}

    assert kept(1.0) == {*ids} and abs(len(kept(0.25)) - 1000) < 100
    assert kept(0.1) < kept(0.25) and abs(len(kept(0.25, seed=1) & kept(0.25)) - 250) < 60
    of_holdout = {name for name in ids if is_in_holdout(name, 0.25)}
    assert abs(len(kept(0.25) & of_holdout) - 250) < 60, 'independent of what is held out'
    assert kept(0.25) == {name for name in ids if xxhash.xxh64_intdigest(f'sample {name}') < 2**62}


def test_a_share_is_held_out_by_the_hash_of_each_image() -> None:
    images = [f'{i}.png' for i in range(40)]
    splits = split_holdout(images, 0.3, seed=0)
    assert splits == {'train': [x for x in images if not is_in_holdout(x, 0.3)],
                      'val': [x for x in images if is_in_holdout(x, 0.3)]}
    assert 5 <= len(splits['val']) <= 20 and splits != split_holdout(images, 0.3, seed=1)
    fewer = split_holdout(images[10:], 0.3, seed=0)
    assert fewer == {name: [x for x in split if x in images[10:]] for name, split in splits.items()}
    assert is_in_holdout('./b/../7.png', 0.3) == is_in_holdout('7.png', 0.3)


@pytest.mark.parametrize('holdout', [8, {'val': 4, 'test': 4}])
def test_more_images_never_move_one_into_a_held_out_number(holdout: Any) -> None:
    few, more = [f'{i}.png' for i in range(40)], [f'{i}.png' for i in range(60, -1, -1)]
    before, after = split_holdout(few, holdout, seed=0), split_holdout(more, holdout, seed=0)
    sizes = {name: len(images) for name, images in after.items()}
    assert sizes == {'train': 53, **(holdout if isinstance(holdout, dict) else {'val': 8})}
    assert {*before['train']} < {*after['train']} and before != split_holdout(few, holdout, seed=1)
    assert sorted(image for images in before.values() for image in images) == sorted(few)


@pytest.mark.parametrize(('holdout', 'split', 'key'), [
    *((holdout, 'train', 'source.holdout') for holdout in (40, -1, 1.5, 1e-9, {'val': 20, 'test': 20})),
    (3, 'val', 'source.split')])
def test_a_holdout_without_two_splits_is_refused(holdout: Any, split: str, key: str) -> None:
    with refused_at(key):
        split_holdout([f'{i}.png' for i in range(40)], holdout, seed=0, split=split)
