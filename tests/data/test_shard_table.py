# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Indexes and tables of shards against what Streaming makes of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from streaming.base.format import reader_from_json

from llm2clip.data.schema import ContentHash, dataset_fingerprint, parse_index
from llm2clip.data.streams.shard_table import AllShards, ShardTable
from llm2clip.files import FileError


def entry(number: int, **other: Any) -> dict[str, Any]:
    return {'column_encodings': ['str', 'bytes'], 'column_names': ['sample_id', 'image'], 'column_sizes': [None, None],
            'compression': None, 'format': 'mds', 'hashes': ['xxh64'], 'samples': 5 + number, 'size_limit': 1000,
            'raw_data': {'basename': f'part-ü/shard.{number}.mds', 'bytes': 10**10 + number, 'hashes': {'xxh64': 'ab'}},
            'version': 2, 'zip_data': None, **other}


SHARDS = [
    entry(0), entry(1, size_limit=None), entry(2, hashes=['sha1', 'xxh64']), entry(3, compression='zstd', zip_data={
        'basename': 'shard.3.mds.zstd', 'bytes': 7, 'hashes': {}})]


def test_readers_are_those_of_streaming() -> None:
    shards = AllShards()
    for of_stream in (SHARDS[:1], SHARDS[1:]):
        shards += ShardTable('folder', 'train', of_stream)
    expected = [vars(reader_from_json('folder', 'train', shard)) for shard in SHARDS]
    assert [vars(shards[i]) for i in range(len(shards))] == [vars(shard) for shard in shards] == expected
    assert [len(shard) for shard in shards[1:4]] == [6, 7, 8] and list(shards[0:1].samples) == [5]
    assert shards[2] is shards[2]


def test_shards_are_known_by_their_files() -> None:
    """Raw or compressed, beside files whose names are no UTF-8."""
    table = ShardTable('folder', '', SHARDS)
    assert table.having({'shard.3.mds.zstd', 'part-ü/shard.1.mds', 'other', os.fsdecode(b'\xff')}).tolist() == [1, 3]
    assert table.having(set()).tolist() == [] and table.raw_bytes.tolist() == [10**10 + i for i in range(4)]


@pytest.mark.parametrize('indent', [None, 2])
def test_an_index_is_read_entry_by_entry(indent: int) -> None:
    for index in ({'version': 2, 'shards': SHARDS}, {'shards': SHARDS, 'other': [1, {'a': []}], 'version': 2}):
        assert parse_index(json.dumps(index, indent=indent), 'here') == {'version': 2, 'shards': SHARDS}
    content = ContentHash()
    for shard in SHARDS:
        content.add(shard)
    # As sidecars have it that are older than this.
    text = json.dumps([(shard['samples'], shard['raw_data']) for shard in SHARDS], sort_keys=True)
    assert content.hexdigest() == dataset_fingerprint({'shards': SHARDS}) == xxhash.xxh64(text).hexdigest()


@pytest.mark.parametrize(['text', 'problem'], [
    ('', r'expected \{'), ('null', r'expected \{'), ('{', 'Expecting value'), ('{"version": 2', 'expected }'),
    ('{"version" 2}', 'expected :'), ('{"version": 2,}', 'Expecting value'), ('{"version": 2} {', 'nothing more'),
    (json.dumps({'version': 2, 'shards': SHARDS})[:-2], 'expected ]'),
    (json.dumps({'version': 2, 'shards': SHARDS})[:300], 'Unterminated|Expecting'),
    ('{"version": 2, "shards": {}}', 'is empty'), ('{"version": 2, "shards": []}', 'is empty'),
    (json.dumps({'version': 2, 'shards': SHARDS}).replace('}]}', '},]}'), 'Expecting value'),
    ('{"shards": [], "version": 1}', 'has version 1'),
    (json.dumps({'version': 2, 'shards': [SHARDS[0], SHARDS[0]]}), 'two shards are in the file part-ü/shard.0.mds'),
    (json.dumps({'version': 2, 'shards': [SHARDS[0], entry(1, samples=0)]}), 'shard 1: has 0 samples'),
])
def test_a_damaged_index_is_named(text: str, problem: str) -> None:
    with pytest.raises(FileError, match=f'^folder/index.json: .*({problem})'):
        parse_index(text, Path('folder/index.json'))
