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

pytestmark = pytest.mark.usefixtures('no_leftovers', 'here')
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


def _rows(count: int) -> list[dict[str, Any]]:
    return [{'url': _url(i), **_captions(i)} for i in range(count)]


def _write_table(name: str, rows: list[dict[str, Any]]) -> None:
    """A CSV, TSV or Parquet file."""
    if name.endswith('.parquet'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
        return
    with open(name, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter='\t' if name.endswith('.tsv') else ',')
        writer.writeheader()
        writer.writerows(rows)


def _write(source: Any, **options: Any) -> Optional[dict[str, int]]:
    return write_splits(*source, 'out', WriterConfig(**options))


def _card() -> dict[str, Any]:
    return json.loads(Path('out/dataset.json').read_text())


def _shards() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path('out').rglob('*.mds'))}


@pytest.fixture(scope='module')
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write_tars(tmp_path_factory.mktemp('tars') / 'cc')


def test_tars_become_a_dataset_with_the_same_bytes() -> None:
    tars = _write_tars(Path('tars'), captions=True)
    assert _write(webdataset(tars, CAPTIONS), num_workers=2, size_limit='1kb') == {'train': 10}
    assert [(row['sample_id'], row['caption.raw'], row['caption.long'], row['image'])
            for row in read_samples('out/train')] == [
        (f'{i:09}', *_captions(i).values(), picture(i)) for i in range(TARS * EACH)]
    assert len(read_index('out/train')['shards']) > TARS


def test_the_hash_of_the_id_decides_the_split() -> None:
    _write_tars(Path('tars'), uid='u{}'.format)

    def ids(pattern: str) -> dict[str, list[str]]:
        splits, _ = webdataset(f'tars/{pattern}', {'raw': 'txt'}, 'uid', holdout=0.5)
        return {name: [sample.sample_id for part in parts for sample in part.read(Dropped())]
                for name, parts in splits.items()}

    every, first = ids('*.tar'), ids('00000.tar')
    assert {*every['train'], *every['val']} == {f'u{i}' for i in range(10)} and every['val']
    assert all(first[name] == [i for i in every[name] if int(i[1:]) < EACH] for name in every)


@pytest.mark.parametrize(('kind', 'image_key', 'key'), [
    ('csv', 'url', _url), ('tsv', 'url', _url), ('parquet', '__key__', '{:09}'.format),
    ('parquet', 'number', lambda i: 7 * i)])
def test_captions_of_tables_give_the_same_shards_as_in_tars(
    kind: str, image_key: str, key: Callable[[int], Any]
) -> None:
    _write(webdataset(_write_tars(Path('cc'), captions=True), CAPTIONS))
    expected = _shards()
    shutil.rmtree('out')
    tars = _write_tars(Path('tars'), number=lambda i: 7 * i)
    # All images and two dead links, from the last to the first.
    rows = [{'id': key(i), 'other': i, **_captions(i)} for i in reversed(range(TARS * EACH + 2))]
    # Files with the names of patterns stand beside those that the patterns would match.
    for name, some in (('[0]', rows[:5]), ('[1]', rows[5:]), ('0', rows[:1]), ('1', rows[:1])):
        _write_table(f'captions_{name}.{kind}', some)
    source = webdataset(tars, CAPTIONS, tables='captions_[[]*', table_key='id', image_key=image_key, index='index')
    assert _write(source) == {'train': TARS * EACH} and _shards() == expected
    assert {*os.listdir('index')} == {'MANIFEST', 'index.json', 'captions.duckdb'}
    for record in Path('out').glob('*/part-*/part.json'):  # else the number of tables times that of the tars
        assert len(json.loads(record.read_text())['options']['inputs']) == 2


def _joined(tars: str, captions: Any = CAPTIONS, **arguments: Any) -> Any:
    """Source of `tars` with the captions of a table, by URL."""
    source = {'tables': 'c.csv', 'table_key': 'url', 'image_key': 'url', 'index': 'index'}
    return webdataset(tars, captions, **{**source, **arguments})


def test_every_image_and_every_row_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Image 1 is damaged, 2 has no row, 4 has empty captions, 5 and 6 are filtered; row 8 stands three times."""
    images = [b'no image' if i == 1 else picture(i) for i in range(TARS * EACH)]
    tars = _write_tars(Path('tars'), images=images, score=lambda i: None if i == 6 else i / 10)
    rows = [{**row, 'language': 'de' if i == 5 else 'en'} for i, row in enumerate(_rows(13)) if i != 2]
    rows[3].update(dict.fromkeys(CAPTIONS.values(), ' '))
    rows += [{**rows[7], 'raw_caption': 'a second row'}, {**rows[0], 'url': ''}, {**rows[7], 'raw_caption': 'a third'}]
    _write_table('c.csv', rows)
    source = _joined(tars, filters={'language': {'values': ['en']}, 'score': {'max': 2}})
    assert '15 rows, of which 1 have no \'url\' and 2 that of an earlier row' in capsys.readouterr().out
    assert _write(source, num_workers=2, max_dropped=0.5) == {'train': 5}
    card = _card()
    assert card['dropped'] == {UNDECODABLE: 1, 'no row in the tables': 1, 'no caption': 1}
    assert card['filtered'] == {'filter language': 1, 'filter score': 1}
    assert card['read'] == TARS * EACH
    found = {int(row['sample_id']): row['caption.raw'] for row in read_samples('out/train')}
    assert found == {i: _captions(i)['raw_caption'] for i in (0, 3, 7, 8, 9)}, 'the first row of a key counts'


def test_columns_of_tables_replace_fields_of_the_same_name() -> None:
    """An image without a row keeps the other fields of its JSON."""
    tars = _write_tars(Path('tars'), alt=lambda i: f'alt {i}', longSV_captions=lambda i: 'of the JSON')
    _write_table('c.parquet', [{'url': _url(i), 'longSV_captions': f'long {i}'} for i in range(1, 10)])
    _write(_joined(tars, {'raw': 'alt', 'long': 'longSV_captions'}, tables='c.parquet'))
    rows = [(row['caption.raw'], row['caption.long']) for row in read_samples('out/train')]
    assert rows == [('alt 0', ''), *((f'alt {i}', f'long {i}') for i in range(1, 10))]


def _open(key: str = 'url', captions: Sequence[str] = ('raw_caption',)) -> CaptionTables:
    return open_tables('index', 'c.*', key, captions)


def _write_and_die() -> None:
    """Be killed before the index is complete."""
    img2dataset.write_json = lambda *_: os._exit(9)
    _open()


def test_a_killed_index_is_built_again_by_one_of_two_processes(tars: str) -> None:
    _write_table('c.csv', _rows(TARS * EACH))
    index, fork = Path('index/captions.duckdb'), multiprocessing.get_context('fork')

    def exit_codes(*targets: Callable[[], object]) -> list[Optional[int]]:
        processes = [fork.Process(target=target) for target in targets]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    assert exit_codes(_write_and_die) == [9] and not index.exists()
    assert exit_codes(_open, _open) == [0, 0] and not Path('index.tmp').exists()
    built = index.stat().st_mtime_ns

    def convert() -> Any:
        return _write(_joined(tars, captions={'raw': 'raw_caption'}), max_dropped=1, num_workers=2)

    Path('index.tmp').mkdir()  # left by a kill after the index was complete
    assert convert() == {'train': TARS * EACH - 1}
    assert index.stat().st_mtime_ns == built and not Path('index.tmp').exists()
    assert _card()['dropped_ids'] == {'no caption': ['000000003']}
    Path('c.csv').write_text(Path('c.csv').read_text().replace('raw 1,', 'another,'))
    with refused_at('source.index'):
        convert()
    shutil.rmtree('index')
    with pytest.raises(ConfigError, match=r'index/index\.json: has changed since .* was written from it'):
        convert()


def test_of_several_rows_with_a_key_the_first_counts() -> None:
    """Also where DuckDB reads them in several pieces and threads."""
    numbers = np.random.default_rng(0).integers(0, 60_000, 200_000)
    rows = pyarrow.table({'key': numbers, 'text': [f'{k} of row {i}' for i, k in enumerate(numbers)]})
    pyarrow.parquet.write_table(rows, 'c.parquet', row_group_size=5000)
    tables = _open('key', ['text'])
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
    file: str, content: str, arguments: dict[str, Any], words: str, tars: str
) -> None:
    for name, text in (('a.csv', f'{HEADER}u,x,y\n'), ('b.csv', f'{HEADER}u,x,y\n'), (file, content)):
        Path(name).write_text(text)
    with pytest.raises((ConfigError, FileError), match=words):
        _joined(tars, **{'tables': '*.csv', **arguments})


@pytest.mark.parametrize('column', ['url', 'raw_caption'])
def test_a_key_or_caption_of_another_type_is_refused(column: str) -> None:
    """Before DuckDB reads the tables, which may take hours."""
    _write_table('c.parquet', [{'url': 'u', 'raw_caption': 'x', column: [1.5]}])
    with pytest.raises(ConfigError, match=f"column '{column}' holds list<.*>, expected texts"):
        _open()


@pytest.mark.parametrize('rows', [4, 20_000])
def test_an_index_that_cannot_be_written_is_named_and_not_the_table(rows: int) -> None:
    """With few rows, DuckDB writes all of them when it closes the file."""
    _write_table('c.parquet', _rows(rows))
    with largest_file(100_000), refused_at(Path.cwd() / 'index', 'File too large'):
        _open()
    assert not Path('index').exists()


def test_an_index_of_other_columns_or_damaged_is_named() -> None:
    _write_table('c.csv', _rows(4))
    assert _open().find([_url(3), 'no']) == {_url(3): {'raw_caption': None}}
    with refused_at('source.index'):
        _open(captions=['longSV_captions'])
    img2dataset._connected.cache_clear()
    index = Path.cwd() / 'index/captions.duckdb'
    index.write_bytes(bytes(5000))
    with refused_at(index):
        _open().find([_url(1)])
