# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Large sources: webdataset tars and tables, converted in parts by several processes, stopped and continued."""

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import webdataset as wds
from parts import UNDECODABLE, make_samples, picture
from PIL import Image
from streaming import StreamingDataset

from llm2clip.config import WriterConfig
from llm2clip.data.convert.img2dataset import webdataset
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.table import table
from llm2clip.data.convert.writer import CARD_FILE, is_written, write_splits
from llm2clip.data.schema import read_index, read_samples
from llm2clip.errors import ConfigError
from llm2clip.io.remotes import OutputFolder

pytestmark = pytest.mark.usefixtures('no_leftovers')
CAPTIONS = {'raw': 'raw_caption', 'long': 'longSV_captions'}


def _tars(folder: Path, tars: int = 3, each: int = 8) -> dict[str, tuple[str, str, bytes]]:
    """Tars as img2dataset writes them, with DreamLIP's captions."""
    folder.mkdir()
    expected = {}
    for t in range(tars):
        with wds.TarWriter(str(folder / f'{t:05}.tar')) as writer:
            for i in range(t * each, (t + 1) * each):
                record = {'raw_caption': f'raw {i}', 'longSV_captions': f'a long caption of {i}', 'uid': f'u{i}'}
                writer.write({'__key__': f'{i:09}', 'jpg': picture(i), 'json': record, 'txt': f'text {i}'})
                expected[f'{i:09}'] = f'raw {i}', f'a long caption of {i}', picture(i)
        (folder / f'{t:05}_stats.json').write_text(json.dumps({'successes': each}))
    return expected


def _rows(out: Path) -> dict[str, tuple[str, str, bytes]]:
    return {row['sample_id']: (row['caption.raw'], row['caption.long'], row['image'])
            for row in read_samples(out / 'train')}


def test_tars_become_a_dataset_with_the_same_bytes(tmp_path: Path) -> None:
    expected = _tars(tmp_path / 'tars')
    splits, dropped = webdataset(f'{tmp_path}/tars/*.tar', CAPTIONS)
    written = write_splits(splits, dropped, tmp_path / 'out', WriterConfig(num_workers=2, size_limit='1kb'))
    assert written == {'train': 24} and _rows(tmp_path / 'out') == expected
    assert list(_rows(tmp_path / 'out')) == sorted(expected)
    assert len(read_index(tmp_path / 'out/train')['shards']) >= 3
    dataset = StreamingDataset(local=str(tmp_path / 'out/train'), batch_size=4)
    assert sorted(sample['sample_id'] for sample in dataset) == sorted(expected)


def test_tars_have_a_held_out_split_by_the_hash_of_the_id(tmp_path: Path) -> None:
    expected = _tars(tmp_path / 'tars')

    def ids(pattern: str) -> dict[str, list[str]]:
        splits, _ = webdataset(f'{tmp_path}/tars/{pattern}', {'raw': 'txt'}, 'uid', holdout=0.3, seed=1)
        return {name: [sample.sample_id for part in parts for sample in part.read(Dropped())]
                for name, parts in splits.items()}

    every, first = ids('*.tar'), ids('00000.tar')
    assert {*every['train'], *every['val']} == {f'u{int(i)}' for i in expected} and 2 <= len(every['val']) <= 12
    assert all(first[name] == [i for i in every[name] if int(i[1:]) < 8] for name in every)


def _part(n: int, prefix: str = 's') -> Part:
    return Part(f'part{n}', lambda dropped: make_samples(6, prefix=f'{prefix}{n}-'))


def test_machines_share_the_parts_and_only_a_remote(tmp_path: Path) -> None:
    """Each uploads its parts; the last one writes the index; nothing needs to stay on their disks."""
    splits, remote = {'train': [_part(n) for n in range(5)]}, tmp_path / 'bucket'
    first, second = (WriterConfig(shard_index=k, num_shards=2, keep_local=False) for k in range(2))
    outs = [OutputFolder(tmp_path / f'machine{k}', str(remote)) for k in range(2)]
    assert write_splits(splits, Dropped(), outs[1], second) is None
    assert not (remote / 'train/index.json').exists() and not outs[0].fetch(CARD_FILE)
    assert sorted(path.name for path in (remote / 'train').iterdir()) == ['part-part1', 'part-part3']
    shutil.rmtree(outs[1].local / 'train/part-part3')
    assert write_splits(splits, Dropped(), outs[1], second) is None, 'a part that is in the remote is done'
    (remote / 'train/part-part1/part.json').unlink()
    (outs[1].local / 'train/part-part1/part.json').unlink()
    assert write_splits(splits, Dropped(), outs[1], second) is None
    assert write_splits(splits, Dropped(), outs[0], first) == {'train': 30}
    assert [row['sample_id'][:3] for row in read_samples(remote / 'train')] == \
        [f's{n}-' for n in range(5) for _ in range(6)]
    assert outs[1].fetch(CARD_FILE)
    assert not [path for out in outs for path in out.local.rglob('*.mds')]
    with pytest.raises(ConfigError, match='written with another source'):
        write_splits(splits, Dropped(), OutputFolder(tmp_path / 'third', str(remote)), first, {'source': 'other'})


def test_a_remote_is_not_added_later(tmp_path: Path) -> None:
    """It would lack the parts that were written without it."""
    splits, remote = {'train': [_part(0), _part(1)]}, str(tmp_path / 'bucket')
    assert write_splits(splits, Dropped(), tmp_path / 'begun', WriterConfig(num_shards=2)) is None
    with pytest.raises(ConfigError, match='was written with another out_remote .*train/part-part0/part.json has it'):
        write_splits(splits, Dropped(), OutputFolder(tmp_path / 'begun', remote))
    write_splits(splits, Dropped(), tmp_path / 'whole')
    assert is_written(OutputFolder(tmp_path / 'whole'), {}, WriterConfig())
    with pytest.raises(ConfigError, match='was written with another out_remote .*whole/dataset.json has it'):
        is_written(OutputFolder(tmp_path / 'whole', remote), {}, WriterConfig())
    assert not (tmp_path / 'bucket').exists()


def test_what_fails_leaves_the_finished_parts(tmp_path: Path) -> None:
    config, done = WriterConfig(num_workers=2), [tmp_path / f'out/train/part-part{n}/part.json' for n in range(2)]

    def read(dropped: Dropped) -> Iterator[Sample]:
        while not all(path.exists() for path in done):
            time.sleep(0.01)
        raise RuntimeError('killed')

    with pytest.raises(RuntimeError, match='killed'):
        write_splits({'train': [_part(0), _part(1), Part('part2', read)]}, Dropped(), tmp_path / 'out', config)
    assert not OutputFolder(tmp_path / 'out').fetch(CARD_FILE) and not (tmp_path / 'out/train/index.json').exists()
    assert not (tmp_path / 'out/train/part-part2').exists()
    # Mended and called again, it continues with the part that is missing.
    first = done[0].stat().st_mtime_ns
    assert write_splits({'train': [_part(n) for n in range(3)]}, Dropped(), tmp_path / 'out', config) == {'train': 18}
    assert done[0].stat().st_mtime_ns == first


def test_parts_must_fit_together(tmp_path: Path) -> None:
    twice = Part('twice', lambda dropped: make_samples(1) * 2)
    with pytest.raises(ValueError, match="sample id 's0000' occurs twice in .*train/part-twice"):
        write_splits({'train': [twice]}, Dropped(), tmp_path / 'a')
    other = Part('other', lambda dropped: [Sample('x', {'short': 'a'}, picture(0))])
    with pytest.raises(ValueError, match='part-other of split .train. has columns'):
        write_splits({'train': [_part(0), other]}, Dropped(), tmp_path / 'b')
    with pytest.raises(ValueError, match='two input files would be written to'):
        write_splits({'train': [_part(0), _part(0)]}, Dropped(), tmp_path / 'c')


def test_too_many_bad_samples_are_counted_over_all_parts(tmp_path: Path) -> None:
    bad = Part('bad', lambda dropped: [Sample('b', {'short': 'a', 'long': 'b'}, b'x')])
    splits = {'train': [_part(0), bad]}
    with pytest.raises(ValueError, match='1 of 7 samples were left out, more than max_dropped=0.02.*undecodable image'):
        write_splits(splits, Dropped(), tmp_path / 'out')
    assert not OutputFolder(tmp_path / 'out').fetch(CARD_FILE) and not (tmp_path / 'out/train/index.json').exists()
    assert write_splits(splits, Dropped(), tmp_path / 'out', WriterConfig(max_dropped=0.2)) == {'train': 6}
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {UNDECODABLE: ['b']}


def test_only_large_images_are_made_smaller(tmp_path: Path) -> None:
    sizes = {'small': 40, 'large': 200}
    samples = [Sample(name, {'short': 'a'}, picture(1, size)) for name, size in sizes.items()]
    write_splits({'train': [Part('all', lambda dropped: samples)]}, Dropped(), tmp_path / 'out',
                 WriterConfig(image_max_side=64))
    small, large = read_samples(tmp_path / 'out/train')
    assert small['image'] == picture(1, 40)
    assert Image.open(io.BytesIO(large['image'])).size == (64, 64)


@pytest.mark.parametrize('kind', ['bytes', 'struct', 'csv'])
def test_tables(kind: str, tmp_path: Path) -> None:
    images = [picture(i) for i in range(7)]
    for i, image in enumerate(images):
        (tmp_path / f'{i}.png').write_bytes(image)
    values = {'bytes': images, 'struct': [{'bytes': image, 'path': None} for image in images],
              'csv': [f'{i}.png' for i in range(7)]}[kind]
    rows = pyarrow.table({'img': values, 'org_caption': [f'raw "{i}",\nor so' for i in range(7)],
                          're_caption': [str(i) for i in range(7)], 'other': range(7)})
    name = 'rows.csv' if kind == 'csv' else 'rows.parquet'
    (pyarrow.csv.write_csv if kind == 'csv' else pyarrow.parquet.write_table)(rows, tmp_path / name)
    captions = {'raw': 'org_caption', 'long': 're_caption'}
    splits, dropped = table(f'{tmp_path}/{name}', captions, 'img', images=str(tmp_path))
    assert write_splits(splits, dropped, tmp_path / 'out') == {'train': 7}
    assert _rows(tmp_path / 'out') == {
        f'{name}:{i + 1}': (f'raw "{i}",\nor so', f'{i}', images[i]) for i in range(7)}


def test_columns_of_lists_become_keys(tmp_path: Path) -> None:
    lists = [['a', 'b', 'c'], ['d'], None, [None, ' ', 'e']]
    for n in range(2):  # the longest list is in one of two tables
        rows = pyarrow.table({'lists': [x[:2] if x and n else x for x in lists], 'text': ['t', None, 'u', '']})
        pyarrow.parquet.write_table(rows, tmp_path / f'{n}.parquet')
    for captions, keys in (('lists', ['0', '1', '2']),
                           ({'en': 'lists', 'raw': 'text'}, ['en_0', 'en_1', 'en_2', 'raw'])):
        out = tmp_path / keys[0]
        write_splits(*table(f'{tmp_path}/*.parquet', captions), out, WriterConfig(max_dropped=1.0))
        found = {row['sample_id']: [row[f'caption.{key}'] for key in keys] for row in read_samples(out / 'train')}
        expected = {'0.parquet:1': ['a', 'b', 'c', 't'], '0.parquet:2': ['d', '', '', ''],
                    '0.parquet:3': ['', '', '', 'u'], '0.parquet:4': ['', '', 'e', ''],
                    '1.parquet:1': ['a', 'b', '', 't'], '1.parquet:2': ['d', '', '', ''],
                    '1.parquet:3': ['', '', '', 'u']}
        expected = {name: texts[:len(keys)] for name, texts in expected.items() if any(texts[:len(keys)])}
        assert found == expected
        card = json.loads((out / 'dataset.json').read_text())
        assert card['dropped'] == {'no caption': 8 - len(expected)}


def test_columns_that_cannot_be_captions_are_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({'a': [b'x'], 'd': ['x'], 'd_0': ['y'], 'e': [['x', 'y']]}),
                                tmp_path / 'a.parquet')
    for captions, message in (('a', "column 'a' holds binary, expected texts or lists"),
                              ('f', "no column 'f'; it has a, d"),
                              ({'d': 'e', 'd_0': 'd'}, 'two captions one key')):
        with pytest.raises(ConfigError, match=message):
            table(f'{tmp_path}/a.parquet', captions)


@pytest.mark.parametrize('kind', ['paths', 'bytes'])
def test_all_rows_of_an_image_are_on_one_side(kind: str, tmp_path: Path) -> None:
    """Two rows per image, whose paths are spelled differently; another table of other images changes nothing."""
    (tmp_path / 'x').mkdir()
    for i in range(15):
        (tmp_path / f'{i}.png').write_bytes(picture(i, 8))
    paths = [f'{"./x/../" if i > 14 else ""}{i % 15}.png' for i in range(30)]
    column = paths if kind == 'paths' else [picture(i % 15, 8) for i in range(30)]
    rows = pyarrow.table({'img': column, 'text': [f'{i}' for i in range(30)]})
    pyarrow.parquet.write_table(rows, tmp_path / 'a.parquet')
    pyarrow.parquet.write_table(rows.slice(3, 9), tmp_path / 'b.parquet')

    def sides(name: str, seed: int = 0) -> dict[int, str]:
        splits, _ = table(f'{tmp_path}/{name}', 'text', 'img', str(tmp_path), holdout=0.4, seed=seed)
        return {int(sample.captions['0']): split for split, parts in splits.items() for part in parts
                for sample in part.read(Dropped())}

    found = sides('a.parquet')
    assert len(found) == 30 and set(found.values()) == {'train', 'val'} and found != sides('a.parquet', seed=1)
    assert all(found[i] == found[i + 15] for i in range(15))
    assert sides('b.parquet') == {i: found[i] for i in range(3, 12)}


def test_images_of_a_table_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / 'rows.csv').write_text('img,text\nno.png,a\n,b\n')
    splits, dropped = table(f'{tmp_path}/rows.csv', 'text', 'img', images=str(tmp_path))
    with pytest.raises(ValueError, match='2 of 2 samples were left out') as error:
        write_splits(splits, dropped, tmp_path / 'out')
    assert f"'missing image file': ['{tmp_path}/no.png'], 'no image': ['rows.csv:2']" in str(error.value)
    assert 'source.images' in str(error.value)


def test_images_that_were_missing_are_read_once_they_are_there(tmp_path: Path) -> None:
    (tmp_path / 'rows.csv').write_text('img,text\n0.png,a\n1.png,b\n')
    (tmp_path / '0.png').write_bytes(picture(0))

    def convert() -> Any:
        return write_splits(*table(f'{tmp_path}/rows.csv', 'text', 'img', images=str(tmp_path)), tmp_path / 'out')

    with pytest.raises(ValueError, match='1 of 2 samples were left out'):
        convert()
    (tmp_path / '1.png').write_bytes(picture(1))
    assert convert() == {'train': 2}
