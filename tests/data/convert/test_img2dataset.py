# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tars of img2dataset, with captions in their JSON or in separate tables."""

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
from disks import largest_file
from parts import UNDECODABLE, picture
from refusals import refused_at

from llm2clip.config import WriterConfig
from llm2clip.data.convert import img2dataset
from llm2clip.data.convert.img2dataset import CaptionTables, open_tables, webdataset
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_index, read_samples
from llm2clip.errors import ConfigError, FileError

pytestmark = pytest.mark.usefixtures('no_leftovers')
CAPTIONS = {'raw': 'raw_caption', 'long': 'longSV_captions'}
TARS, EACH = 2, 5


def _url(i: int) -> str:
    return f'https://example.com/{i}.jpg?a=1,"{i}"'


def _captions(i: int) -> dict[str, str]:
    return {'raw_caption': f'raw {i}, of "{i}"' if i != 3 else '', 'longSV_captions': f'a long\r\ncaption\nof é {i}'}


def _write_tars(
    folder: Path, captions: bool = False, images: Sequence[bytes] = (), **fields: Callable[[int], Any]
) -> str:
    """Tars in the layout of img2dataset, with DreamLIP's captions in their JSON or without."""
    folder.mkdir()
    for t in range(TARS):
        with wds.TarWriter(str(folder / f'{t:05}.tar')) as writer:
            for i in range(t * EACH, (t + 1) * EACH):
                record = {'url': _url(i), 'key': f'{i:09}', 'status': 'success', 'width': 48, 'height': 48,
                          **(_captions(i) if captions else {}), **{name: value(i) for name, value in fields.items()}}
                writer.write({'__key__': f'{i:09}', 'jpg': images[i] if images else picture(i), 'json': record,
                              'txt': f'text {i}'})
    return f'{folder}/*.tar'


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV, TSV or Parquet file."""
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter='\t' if path.suffix == '.tsv' else ',')
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
    """Shards of tars that have the captions."""
    folder = tmp_path_factory.mktemp('expected')
    _write(webdataset(_write_tars(folder / 'cc', captions=True), CAPTIONS), folder / 'out')
    return _shards(folder / 'out')


def test_tars_become_a_dataset_with_the_same_bytes(tmp_path: Path) -> None:
    tars = _write_tars(tmp_path / 'tars', captions=True)
    assert _write(webdataset(tars, CAPTIONS), tmp_path / 'out', num_workers=2, size_limit='1kb') == {'train': 10}
    assert [(row['sample_id'], row['caption.raw'], row['caption.long'], row['image'])
            for row in read_samples(tmp_path / 'out/train')] == [
        (f'{i:09}', *_captions(i).values(), picture(i)) for i in range(TARS * EACH)]
    assert len(read_index(tmp_path / 'out/train')['shards']) > TARS


def test_the_hash_of_the_id_decides_the_split(tmp_path: Path) -> None:
    _write_tars(tmp_path / 'tars', uid='u{}'.format)

    def ids(pattern: str) -> dict[str, list[str]]:
        splits, _ = webdataset(f'{tmp_path}/tars/{pattern}', {'raw': 'txt'}, 'uid', holdout=0.5)
        return {name: [sample.sample_id for part in parts for sample in part.read(Dropped())]
                for name, parts in splits.items()}

    every, first = ids('*.tar'), ids('00000.tar')
    assert {*every['train'], *every['val']} == {f'u{i}' for i in range(10)} and every['val']
    assert all(first[name] == [i for i in every[name] if int(i[1:]) < EACH] for name in every)


@pytest.mark.parametrize(('kind', 'image_key', 'key'), [
    ('csv', 'url', _url), ('tsv', 'url', _url), ('parquet', '__key__', '{:09}'.format),
    ('parquet', 'number', lambda i: 7 * i)])
def test_captions_of_tables_give_the_same_shards_as_in_tars(
    kind: str, image_key: str, key: Callable[[int], Any], expected: dict[str, bytes], tmp_path: Path
) -> None:
    tars = _write_tars(tmp_path / 'tars', number=lambda i: 7 * i)
    # All images and two dead links, from the last to the first.
    rows = [{'id': key(i), 'other': i, **_captions(i)} for i in reversed(range(TARS * EACH + 2))]
    # Files with the names of patterns stand beside those that the patterns would match.
    for name, some in (('[0]', rows[:5]), ('[1]', rows[5:]), ('0', rows[:1]), ('1', rows[:1])):
        _write_table(tmp_path / f'captions_{name}.{kind}', some)
    source = webdataset(tars, CAPTIONS, tables=f'{tmp_path}/captions_[[]*', table_key='id', image_key=image_key,
                        index=f'{tmp_path}/index')
    assert _write(source, tmp_path / 'out') == {'train': TARS * EACH}
    assert _shards(tmp_path / 'out') == expected
    assert {path.name for path in (tmp_path / 'index').iterdir()} == {'MANIFEST', 'index.json', 'captions.duckdb'}
    for record in (tmp_path / 'out').glob('*/part-*/part.json'):  # else the number of tables times that of the tars
        assert len(json.loads(record.read_text())['options']['inputs']) == 2


def _joined(tars: str, folder: Path, table: str = 'c.csv', captions: Any = CAPTIONS, **arguments: Any) -> Any:
    """Source of `tars` with the captions of a table in `folder`, by URL."""
    source = {'tables': f'{folder}/{table}', 'table_key': 'url', 'image_key': 'url', 'index': f'{folder}/index'}
    return webdataset(tars, captions, **{**source, **arguments})


def test_every_image_and_every_row_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Image 1 is damaged, 2 has no row, 4 has empty captions, 5 and 6 are filtered; row 8 stands three times."""
    images = [b'no image' if i == 1 else picture(i) for i in range(TARS * EACH)]
    tars = _write_tars(tmp_path / 'tars', images=images, score=lambda i: None if i == 6 else i / 10)
    rows = [{'url': _url(i), 'language': 'de' if i == 5 else 'en', **_captions(i)} for i in range(13) if i != 2]
    rows[3].update(dict.fromkeys(CAPTIONS.values(), ' '))
    rows += [{**rows[7], 'raw_caption': 'a second row'}, {**rows[0], 'url': ''}, {**rows[7], 'raw_caption': 'a third'}]
    _write_table(tmp_path / 'c.csv', rows)
    source = _joined(tars, tmp_path, filters={'language': {'values': ['en']}, 'score': {'max': 2}})
    assert '15 rows, of which 1 have no \'url\' and 2 that of an earlier row' in capsys.readouterr().out
    assert _write(source, tmp_path / 'out', num_workers=2, max_dropped=0.5) == {'train': 5}
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped'] == {UNDECODABLE: 1, 'no row in the tables': 1, 'no caption': 1}
    assert card['filtered'] == {'filter language': 1, 'filter score': 1}
    assert card['read'] == TARS * EACH
    found = {int(row['sample_id']): row['caption.raw'] for row in read_samples(tmp_path / 'out/train')}
    assert found == {i: _captions(i)['raw_caption'] for i in (0, 3, 7, 8, 9)}, 'the first row of a key counts'


def test_columns_of_tables_replace_fields_of_the_same_name(tmp_path: Path) -> None:
    """An image without a row keeps the other fields of its JSON."""
    tars = _write_tars(tmp_path / 'tars', alt=lambda i: f'alt {i}', longSV_captions=lambda i: 'of the JSON')
    _write_table(tmp_path / 'c.parquet', [{'url': _url(i), 'longSV_captions': f'long {i}'} for i in range(1, 10)])
    _write(_joined(tars, tmp_path, 'c.parquet', {'raw': 'alt', 'long': 'longSV_captions'}), tmp_path / 'out')
    rows = [(row['caption.raw'], row['caption.long']) for row in read_samples(tmp_path / 'out/train')]
    assert rows == [('alt 0', ''), *((f'alt {i}', f'long {i}') for i in range(1, 10))]


def _open(folder: Path, key: str = 'url', captions: Sequence[str] = ('raw_caption',)) -> CaptionTables:
    return open_tables(f'{folder}/index', f'{folder}/c.*', key, captions)


def _write_and_die(folder: Path) -> None:
    """Be killed before the index is complete."""
    img2dataset.write_json = lambda *_: os._exit(9)
    _open(folder)


def test_a_killed_index_is_built_again_by_one_of_two_processes(tars: str, tmp_path: Path) -> None:
    _write_table(tmp_path / 'c.csv', [{'url': _url(i), **_captions(i)} for i in range(TARS * EACH)])
    fork = multiprocessing.get_context('fork')

    def exit_codes(*targets: Callable[[Path], object]) -> list[Optional[int]]:
        processes = [fork.Process(target=target, args=(tmp_path,)) for target in targets]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    assert exit_codes(_write_and_die) == [9] and not (tmp_path / 'index').exists()
    assert exit_codes(_open, _open) == [0, 0] and not (tmp_path / 'index.tmp').exists()
    built = (tmp_path / 'index/captions.duckdb').stat().st_mtime_ns

    def convert() -> Any:
        source = _joined(tars, tmp_path, captions={'raw': 'raw_caption'})
        return _write(source, tmp_path / 'other', max_dropped=1, num_workers=2)

    assert convert() == {'train': TARS * EACH - 1}
    assert (tmp_path / 'index/captions.duckdb').stat().st_mtime_ns == built
    card = json.loads((tmp_path / 'other/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption': ['000000003']}
    (tmp_path / 'c.csv').write_text((tmp_path / 'c.csv').read_text().replace('raw 1,', 'another,'))
    with refused_at('source.index'):
        convert()
    shutil.rmtree(tmp_path / 'index')
    with pytest.raises(ConfigError, match=r'index/index\.json: has changed since .* was written from it'):
        convert()


def test_of_several_rows_with_a_key_the_first_counts(tmp_path: Path) -> None:
    """Also where DuckDB reads them in several pieces and threads."""
    numbers = np.random.default_rng(0).integers(0, 60_000, 200_000)
    rows = pyarrow.table({'key': numbers, 'text': [f'{k} of row {i}' for i, k in enumerate(numbers)]})
    pyarrow.parquet.write_table(rows, tmp_path / 'c.parquet', row_group_size=5000)
    tables = _open(tmp_path, 'key', ['text'])
    first = {int(k): i for i, k in reversed(list(enumerate(numbers)))}
    wanted = range(0, 60_000, 977)
    assert tables.find([str(k) for k in wanted]) == {
        str(k): {'text': f'{k} of row {first[k]}'} for k in wanted if k in first}


HEADER = 'url,raw_caption,longSV_captions\n'


@pytest.mark.parametrize(('file', 'content', 'arguments', 'words'), [
    ('b.csv', 'url,raw_caption\n', {}, r"b\.csv: expected one column 'longSV_captions', found url, raw_caption"),
    ('a.csv', 'url,x\n', {}, r'source\.captions: .*a\.csv has none of the columns raw_caption, longSV_captions; it'),
    ('a.csv', f'{HEADER}u,x,y\nv,"x,y\n', {}, r'a\.csv: cannot be read .*Line: 3.*expected a CSV file'),
    ('a.csv', f'{HEADER},x,y\n', {'tables': 'a.csv'}, r"source\.tables: no row of a\.csv has a 'url'"),
    ('a.parquet', 'PAR1 no table', {'tables': '*.parquet'}, r'a\.parquet: cannot be read .*expected a Parquet file'),
    ('x', '', {'image_key': None}, r'source\.image_key: required for captions in tables')])
def test_tables_that_cannot_be_joined_are_named(
    file: str, content: str, arguments: dict[str, Any], words: str, tars: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (('a.csv', f'{HEADER}u,x,y\n'), ('b.csv', f'{HEADER}u,x,y\n'), (file, content)):
        Path(name).write_text(text)
    with pytest.raises((ConfigError, FileError), match=words):
        _joined(tars, tmp_path, **{'tables': '*.csv', **arguments})


@pytest.mark.parametrize('column', ['url', 'raw_caption'])
def test_a_key_or_caption_of_another_type_is_refused(column: str, tmp_path: Path) -> None:
    """Before DuckDB reads the tables, which may take hours."""
    _write_table(tmp_path / 'c.parquet', [{'url': 'u', 'raw_caption': 'x', column: [1.5]}])
    with pytest.raises(ConfigError, match=f"column '{column}' holds list<.*>, expected texts"):
        _open(tmp_path)


@pytest.mark.parametrize('rows', [4, 20_000])
def test_an_index_that_cannot_be_written_is_named_and_not_the_table(rows: int, tmp_path: Path) -> None:
    """With few rows, DuckDB writes all of them when it closes the file."""
    _write_table(tmp_path / 'c.parquet', [{'url': _url(i), **_captions(i)} for i in range(rows)])
    with largest_file(100_000), refused_at(tmp_path / 'index', 'File too large'):
        _open(tmp_path)
    assert not (tmp_path / 'index').exists()


def test_a_complete_index_loses_what_a_kill_left_beside_it(tmp_path: Path) -> None:
    _write_table(tmp_path / 'c.csv', [{'url': _url(0), **_captions(0)}])
    _open(tmp_path)
    built = (tmp_path / 'index/captions.duckdb').stat().st_mtime_ns
    (tmp_path / 'index.tmp').mkdir()
    _open(tmp_path)
    assert not (tmp_path / 'index.tmp').exists()
    assert (tmp_path / 'index/captions.duckdb').stat().st_mtime_ns == built
    (tmp_path / 'index.tmp').mkdir()
    (tmp_path / 'index.tmp/notes').touch()
    with refused_at('', 'index.tmp is in the way'):
        _open(tmp_path)
    assert (tmp_path / 'index.tmp/notes').is_file()


def test_an_index_of_other_columns_or_damaged_is_named(tmp_path: Path) -> None:
    _write_table(tmp_path / 'c.csv', [{'url': _url(i), **_captions(i)} for i in range(4)])
    assert _open(tmp_path).find([_url(3), 'no']) == {_url(3): {'raw_caption': None}}
    with refused_at('source.index'):
        _open(tmp_path, captions=['longSV_captions'])
    img2dataset._connected.cache_clear()
    (tmp_path / 'index/captions.duckdb').write_bytes(bytes(5000))
    with refused_at(f'{tmp_path}/index/captions.duckdb'):
        _open(tmp_path).find([_url(1)])
