# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions from tables elsewhere: the same dataset as if they were in the tars, and every row and image counted."""

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset as wds
from parts import UNDECODABLE, picture

from llm2clip.config import WriterConfig
from llm2clip.data.convert import img2dataset
from llm2clip.data.convert.img2dataset import CaptionTables, open_tables, webdataset
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples
from llm2clip.errors import ConfigError, FileError

CAPTIONS = {'raw': 'raw_caption', 'long': 'longSV_captions'}
TARS, EACH = 2, 5


def _url(i: int) -> str:
    return f'https://example.com/{i}.jpg?a=1,"{i}"'


def _captions(i: int) -> dict[str, str]:
    return {'raw_caption': f'raw {i}, of "{i}"' if i != 3 else '', 'longSV_captions': f'a long\r\ncaption\nof é {i}'}


def _write_tars(
    folder: Path, captions: bool = False, images: Sequence[bytes] = (), **fields: Callable[[int], Any]
) -> str:
    """Tars in the layout of img2dataset, with the captions in their JSON or without."""
    folder.mkdir()
    for t in range(TARS):
        with wds.TarWriter(str(folder / f'{t:05}.tar')) as writer:
            for i in range(t * EACH, (t + 1) * EACH):
                record = {'url': _url(i), 'key': f'{i:09}', 'status': 'success', 'width': 48, 'height': 48,
                          **(_captions(i) if captions else {}), **{name: value(i) for name, value in fields.items()}}
                writer.write({'__key__': f'{i:09}', 'jpg': images[i] if images else picture(i), 'json': record})
        (folder / f'{t:05}_stats.json').write_text(json.dumps({'count': EACH + 1, 'successes': EACH}))
    return f'{folder}/*.tar'


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], delimiter: str = ',') -> None:
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _write(source: Any, out: Path, **options: Any) -> Optional[dict[str, int]]:
    return write_splits(*source, out, WriterConfig(**options))


def _shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob('*.mds'))}


@pytest.fixture(scope='module')
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write_tars(tmp_path_factory.mktemp('tars') / 'cc')


@pytest.fixture(scope='module')
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is written of tars that have the captions."""
    folder = tmp_path_factory.mktemp('expected')
    _write(webdataset(_write_tars(folder / 'cc', captions=True), CAPTIONS), folder / 'out')
    return _shards(folder / 'out')


def _rows(key: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Of all images and of two dead links, from the last to the first."""
    return [{'id': key(i), 'other': i, **_captions(i)} for i in reversed(range(TARS * EACH + 2))]


KEYS: dict[str, tuple[str, Callable[[int], Any]]] = {
    'csv': ('url', _url), 'tsv': ('url', _url), 'key': ('__key__', '{:09}'.format),
    'numbers': ('number', lambda i: 7 * i)}


@pytest.mark.parametrize('kind', list(KEYS))
def test_the_dataset_is_the_same_as_if_the_captions_were_in_the_tars(
    kind: str, tars: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    image_key, key = KEYS[kind]
    if kind == 'numbers':
        tars = _write_tars(tmp_path / 'tars', number=key)
    rows = _rows(key)
    # Of the same names as patterns are files beside them.
    for name, some in (('[0]', rows[:5]), ('[1]', rows[5:]), ('0', rows[:1]), ('1', rows[:1])):
        if kind in ('csv', 'tsv'):
            _write_csv(tmp_path / f'captions_{name}.{kind}', some, '\t' if kind == 'tsv' else ',')
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / f'captions_{name}.parquet')
    source = webdataset(tars, CAPTIONS, tables=f'{tmp_path}/captions_[[]*', table_key='id', image_key=image_key,
                        index=f'{tmp_path}/index')
    assert _write(source, tmp_path / 'out') == {'train': TARS * EACH}
    assert _shards(tmp_path / 'out') == expected
    assert {path.name for path in (tmp_path / 'index').iterdir()} == {
        'MANIFEST', 'index.json', 'captions.duckdb'}


def test_every_image_and_every_row_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Image 1 is damaged, 2 has no row, 4 has empty captions, 5 and 6 are filtered; row 8 stands three times."""
    images = [b'no image' if i == 1 else picture(i) for i in range(TARS * EACH)]
    tars = _write_tars(tmp_path / 'tars', images=images, score=lambda i: None if i == 6 else i / 10)
    rows = [{'url': _url(i), 'language': 'de' if i == 5 else 'en', **_captions(i)} for i in range(13) if i != 2]
    rows[3].update(dict.fromkeys(CAPTIONS.values(), ' '))
    rows += [{**rows[7], 'raw_caption': 'a second row'}, {**rows[0], 'url': ''}, {**rows[7], 'raw_caption': 'a third'}]
    _write_csv(tmp_path / 'captions.csv', rows)
    splits, dropped = webdataset(
        tars, CAPTIONS, tables=f'{tmp_path}/captions.csv', table_key='url', image_key='url', index=f'{tmp_path}/index',
        filters={'language': {'values': ['en']}, 'score': {'max': 2}})
    assert '15 rows, of which 1 have no \'url\' and 2 that of an earlier row' in capsys.readouterr().out
    assert write_splits(splits, dropped, tmp_path / 'out', WriterConfig(num_workers=2, max_dropped=0.5)) == {'train': 5}
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped'] == {UNDECODABLE: 1, 'no row in the tables': 1, 'no caption': 1}
    assert card['filtered'] == {'filter language': 1, 'filter score: no value': 1}
    assert card['read'] == TARS * EACH == sum(card['samples'].values()) + sum(card['dropped'].values()) + \
        sum(card['filtered'].values())
    found = {int(row['sample_id']): row['caption.raw'] for row in read_samples(tmp_path / 'out/train')}
    assert found == {i: _captions(i)['raw_caption'] for i in (0, 3, 7, 8, 9)}, 'the first row of a key counts'


def test_captions_of_the_tars_and_of_tables_go_together(tmp_path: Path) -> None:
    """An image without a row keeps those of its JSON; a column of the tables hides a field of the same name."""
    tars = _write_tars(tmp_path / 'tars', alt=lambda i: f'alt {i}', longSV_captions=lambda i: 'of the JSON')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(
        [{'url': _url(i), 'longSV_captions': f'long {i}'} for i in range(1, 10)]), tmp_path / 'c.parquet')
    source = {'tables': f'{tmp_path}/c.parquet', 'table_key': 'url', 'image_key': 'url', 'index': f'{tmp_path}/index'}
    _write(webdataset(tars, {'raw': 'alt', 'long': 'longSV_captions'}, **source), tmp_path / 'out')
    rows = [(row['caption.raw'], row['caption.long']) for row in read_samples(tmp_path / 'out/train')]
    assert rows == [('alt 0', ''), *((f'alt {i}', f'long {i}') for i in range(1, 10))]


def _open(folder: Path, key: str = 'url', captions: Sequence[str] = ('raw_caption',)) -> CaptionTables:
    return open_tables(f'{folder}/index', f'{folder}/c.*', key, captions)


def _write_and_die(folder: Path) -> None:
    """Be killed before the index is complete."""
    img2dataset.write_json = lambda *_: os._exit(9)
    _open(folder)


def test_what_is_killed_goes_on_and_several_processes_build_one_index(tars: str, tmp_path: Path) -> None:
    rows = [{'url': _url(i), **_captions(i)} for i in range(TARS * EACH)]
    _write_csv(tmp_path / 'c.csv', rows)
    fork = multiprocessing.get_context('fork')
    killed = fork.Process(target=_write_and_die, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == 9 and not (tmp_path / 'index').exists()
    processes = [fork.Process(target=_open, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and not (tmp_path / 'index.tmp').exists()
    built = (tmp_path / 'index/captions.duckdb').stat().st_mtime_ns

    def source() -> Any:
        return webdataset(tars, {'raw': 'raw_caption'}, tables=f'{tmp_path}/c.csv', table_key='url', image_key='url',
                          index=f'{tmp_path}/index')

    assert _write(source(), tmp_path / 'other', max_dropped=1, num_workers=2) == {'train': TARS * EACH - 1}
    assert (tmp_path / 'index/captions.duckdb').stat().st_mtime_ns == built
    card = json.loads((tmp_path / 'other/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption': ['000000003']}
    (tmp_path / 'c.csv').write_text((tmp_path / 'c.csv').read_text().replace('raw 1,', 'another,'))
    with pytest.raises(ConfigError, match=r'source\.index: .* was built from other tables'):
        source()
    shutil.rmtree(tmp_path / 'index')
    with pytest.raises(ConfigError, match=r'c\.csv: has changed since .* was written from it'):
        _write(source(), tmp_path / 'other', max_dropped=1)


def test_of_several_rows_with_a_key_the_first_counts(tmp_path: Path) -> None:
    """Also where DuckDB reads them in several pieces and threads."""
    numbers = np.random.default_rng(0).integers(0, 60_000, 200_000)
    pyarrow.parquet.write_table(
        pyarrow.table({'key': numbers, 'text': [f'{k} of row {i}' for i, k in enumerate(numbers)]}),
        tmp_path / 'c.parquet', row_group_size=5000)
    tables = _open(tmp_path, 'key', ['text'])
    first = {int(k): i for i, k in reversed(list(enumerate(numbers)))}
    wanted = range(0, 60_000, 977)
    assert tables.find([str(k) for k in wanted]) == {
        str(k): {'text': f'{k} of row {first[k]}'} for k in wanted if k in first}


HEADER = 'url,raw_caption,longSV_captions\n'
DAMAGE: list[tuple[str, bytes, dict[str, Any], str]] = [
    ('b.csv', b'url,raw_caption\n', {}, r"b\.csv has no column 'longSV_captions'; it has url, raw_caption"),
    ('a.csv', b'url,x\n', {}, r'source\.captions: .*a\.csv has none of the columns raw_caption, longSV_captions; it'),
    ('a.csv', HEADER.encode() + b'u,x,y\nv,"x,y\n', {}, r'a\.csv: cannot be read .*Line: 3.*expected a CSV file'),
    ('a.csv', HEADER.encode() + b',x,y\n', {'tables': 'a.csv'}, r"source\.tables: no row of a\.csv has a 'url'"),
    ('a.parquet', b'PAR1 no table', {'tables': '*.parquet'}, r'a\.parquet: cannot be read .*expected a Parquet file'),
    ('x', b'', {'image_key': None}, r'source\.image_key: required for captions in tables')]


@pytest.mark.parametrize(['file', 'content', 'arguments', 'words'], DAMAGE)
def test_what_cannot_be_joined_is_named(
    file: str, content: bytes, arguments: dict[str, Any], words: str, tars: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('a.csv', 'b.csv'):
        Path(name).write_text(f'{HEADER}{_url(0).replace(",", "").replace(chr(34), "")},x,y\n')
    Path(file).write_bytes(content)
    source = {'files': tars, 'captions': CAPTIONS, 'tables': '*.csv', 'table_key': 'url', 'image_key': 'url',
              'index': 'index', **arguments}
    with pytest.raises((ConfigError, FileError), match=words):
        splits, dropped = webdataset(**source)
        list(splits['train'][0].read(dropped))


def test_an_index_that_does_not_fit_or_is_damaged_is_named(tmp_path: Path) -> None:
    _write_csv(tmp_path / 'c.csv', [{'url': _url(i), **_captions(i)} for i in range(4)])
    assert _open(tmp_path).find([_url(3), 'no']) == {_url(3): {'raw_caption': None}}
    with pytest.raises(ConfigError, match=r'source\.index: .* was built from other columns .*index\.json has them'):
        _open(tmp_path, captions=['longSV_captions'])
    img2dataset._connected.cache_clear()
    (tmp_path / 'index/captions.duckdb').write_bytes(bytes(5000))
    with pytest.raises(FileError, match=r'captions\.duckdb: cannot be read .*expected an index of captions; remove'):
        _open(tmp_path).find([_url(1)])
