# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text pairs of embedding data."""

import json
from pathlib import Path

from llm2clip.config import WriterConfig
from llm2clip.data.convert.text_pairs import text_pairs
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples


def test_a_pair_with_an_empty_side_is_counted(tmp_path: Path) -> None:
    path = tmp_path / 'pairs.jsonl'
    records = [{'query': f'q{i}', 'positive': f'p{i}', **({'negative': f'n{i}'} if i % 2 else {})} for i in range(40)]
    records[7]['positive'] = ' '
    path.write_text('\n'.join(map(json.dumps, records)) + '\n\n')
    written = write_splits(*text_pairs(str(path), holdout=0.25), tmp_path / 'out', WriterConfig(max_dropped=0.05))
    assert written is not None and sum(written.values()) == 39 and 4 <= written['val'] <= 16
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption positive': ['pairs.jsonl:8']}
    rows = [row for name in written for row in read_samples(tmp_path / 'out' / name)]
    found = {row['sample_id']: tuple(row[f'caption.{k}'] for k in ('query', 'positive', 'negative')) for row in rows}
    assert found == {f'pairs.jsonl:{i + 1}': (f'q{i}', f'p{i}', f'n{i}' if i % 2 else '')
                     for i in range(40) if i != 7}


def test_each_file_may_be_a_split(tmp_path: Path) -> None:
    for name in ('fever', 'nq'):
        (tmp_path / f'{name}.jsonl').write_text(f'{{"query": "{name}?", "positive": "p"}}\n')
    files = [f'{tmp_path}/fever.jsonl', f'{tmp_path}/nq.jsonl']
    write_splits(*text_pairs(files, by_file=True), tmp_path / 'out')
    for name in ('fever', 'nq'):
        assert [row['caption.query'] for row in read_samples(tmp_path / 'out' / name)] == [f'{name}?']
