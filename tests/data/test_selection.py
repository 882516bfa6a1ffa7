# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which samples are wanted: filters and a stated part, the same for every source, and counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import xxhash
from parts import picture

from llm2clip.config import WriterConfig
from llm2clip.data.convert.samples import Dropped, Selection, is_in_holdout
from llm2clip.data.convert.table import table
from llm2clip.data.convert.writer import write_splits
from llm2clip.errors import ConfigError, FileError


@pytest.mark.parametrize(('limits', 'kept', 'left_out'), [
    ({'min': 5}, [5, 5.5, '5', '1e9', 10**30], [4, '4.99', -1, float('-inf')]),
    ({'max': 0.3}, [0.3, '-7', 0], [0.31, '1', float('inf')]),
    ({'min': 0, 'max': 1}, [0, 1, '0.5'], [-0.1, 1.1]),
    ({'values': ['en', 'de']}, ['en', 'de'], ['fr', 'EN', 'end', 1]),
    ({'values': [False, 3]}, [False, 'false', 3, '3', 3.0], [True, 0, 'False', 3.5])])
def test_values_are_kept_or_not(limits: dict[str, Any], kept: list[Any], left_out: list[Any]) -> None:
    selection, dropped = Selection({'x': limits}), Dropped()
    assert not any(selection.filters_out({'x': value}, 's', dropped) for value in kept) and not dropped.filtered
    assert all(selection.filters_out({'x': value}, 's', dropped) for value in left_out)
    assert dropped.filtered == {'filter x': len(left_out)}
    for value in (None, '', ' ', *([float('nan'), 'nan'] if 'values' not in limits else [])):
        assert selection.filters_out({'x': value}, 's', dropped)
        assert dropped.filtered.pop('filter x: no value') == 1


def test_filters_that_cannot_be_are_named() -> None:
    for filters, words in (({'x': {'least': 1}}, r'source\.filters\.x\.least: a filter takes no such argument'),
                           ({'x': {'min': 2, 'values': ['a']}}, r'source\.filters\.x: expected min, max or both'),
                           ({'x': {'min': 2, 'max': 1}}, r'source\.filters\.x: min is 2 and max is 1, expected the s'),
                           ({'x': {'max': float('nan')}}, r'source\.filters\.x\.max: nan, expected')):
        with pytest.raises(ConfigError, match=words):
            Selection(filters)
    with pytest.raises(FileError, match=r"t\.csv:3: 'x': 'wide', expected a number"):
        Selection({'x': {'min': 1}}).filters_out({'x': 'wide'}, 't.csv:3', Dropped())
    with pytest.raises(ConfigError, match=r"t\.csv:3 has no 'x'; it has y"):
        Selection({'x': {'min': 1}}).filters_out({'y': 1}, 't.csv:3', Dropped())


def test_the_part_that_is_kept_depends_on_the_id_alone() -> None:
    ids = [f's{i}' for i in range(4000)]

    def kept(share: float, seed: int = 0) -> set[str]:
        selection = Selection(share=share, seed=seed)
        return {name for name in ids if not selection.samples_out(name, Dropped())}

    assert kept(1.0) == {*ids} and abs(len(kept(0.25)) - 1000) < 100
    assert kept(0.1) < kept(0.25) and abs(len(kept(0.25, seed=1) & kept(0.25)) - 250) < 60
    of_holdout = {name for name in ids if is_in_holdout(name, 0.25)}
    assert abs(len(kept(0.25) & of_holdout) - 250) < 60, 'independent of what is held out'
    assert kept(0.25) == {name for name in ids if xxhash.xxh64_intdigest(f'sample {name}') < 2**62}


def test_a_table_is_filtered_and_sampled(tmp_path: Path) -> None:
    """Rows go the same way in any order, and the card says where all of them went."""
    rows = [{'id': f'r{i}', 'img': f'{i}.png', 'text': f't{i}', 'score': None if i == 7 else i / 40,
             'language': 'en' if i % 4 else 'de'} for i in range(40)]
    for i in range(40):
        if i != 10:
            (tmp_path / f'{i}.png').write_bytes(picture(i, 8))
    for name, some in (('a', rows), ('b', rows[20:] + rows[:20])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / f'{name}.parquet')

    def source(name: str) -> Any:
        return table(f'{tmp_path}/{name}.parquet', 'text', 'img', str(tmp_path), 'id', holdout=0.3, sample=0.7,
                     filters={'language': {'values': ['en']}, 'score': {'min': 0.1}})

    written = write_splits(*source('a'), tmp_path / 'out', WriterConfig(max_dropped=0.5))
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    sampled = {i for i in range(40) if xxhash.xxh64_intdigest(f'sample r{i}') / 2**64 < 0.7}
    english = {i for i in sampled if i % 4}
    scored = {i for i in english if i != 7 and i >= 4}
    expected = {'not in the sample': 40 - len(sampled), 'filter language': len(sampled) - len(english),
                'filter score: no value': len(english & {7}), 'filter score': len({i for i in english if i < 4})}
    assert card['filtered'] == {reason: n for reason, n in expected.items() if n}
    assert card['dropped'] == ({'missing image file': 1} if 10 in scored else {})
    assert card['read'] == 40 and written is not None and sum(written.values()) == len(scored - {10})

    def sides(name: str) -> dict[str, set[str]]:
        splits, _ = source(name)
        return {split: {sample.sample_id for part in parts for sample in part.read(Dropped())}
                for split, parts in splits.items()}

    assert sides('a') == sides('b')
