# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tables with one row per sample: Parquet and CSV files, and datasets of Hugging Face's library."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import xxhash
from parts import picture
from refusals import refused_at
from set_files import write_images

from llm2clip.config import WriterConfig
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.table import huggingface, table
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples

pytestmark = pytest.mark.usefixtures('here')


def _written(source: Any, out: str = 'out') -> list[dict[str, Any]]:
    """Samples of all splits of a source, half of which may be unusable."""
    written = write_splits(*source, out, WriterConfig(max_dropped=0.5))
    return [row for split in written or {} for row in read_samples(f'{out}/{split}')]


def _card(out: str = 'out') -> dict[str, Any]:
    return json.loads(Path(out, 'dataset.json').read_text())


def _write_pictures(count: int, size: int = 48) -> list[bytes]:
    images = [picture(i, size) for i in range(count)]
    for i, image in enumerate(images):
        Path(f'{i}.png').write_bytes(image)
    return images


@pytest.mark.parametrize('kind', ['bytes', 'struct', 'csv'])
def test_images_of_a_table_are_bytes_structs_or_paths(kind: str) -> None:
    images = _write_pictures(7)
    values = {'bytes': images, 'struct': [{'bytes': image, 'path': None} for image in images],
              'csv': [f'{i}.png' for i in range(7)]}[kind]
    rows = pyarrow.table({'img': values, 'org_caption': [f'raw "{i}",\nor so' for i in range(7)],
                          're_caption': [str(i) for i in range(7)], 'other': range(7)})
    name = 'rows.csv' if kind == 'csv' else 'rows.parquet'
    (pyarrow.csv.write_csv if kind == 'csv' else pyarrow.parquet.write_table)(rows, name)
    captions = {'raw': 'org_caption', 'long': 're_caption'}
    found = _written(table(name, captions, 'img', images='.'))
    assert found == [{'sample_id': f'{name}:{i + 1}', 'image': image, 'caption.raw': f'raw "{i}",\nor so',
                      'caption.long': f'{i}'} for i, image in enumerate(images)]


def test_columns_of_lists_become_keys() -> None:
    lists = [['a', 'b', 'c'], ['d'], None, [None, ' ', 'e']]
    for n in range(2):  # the longest list is in one of two tables
        rows = pyarrow.table({'lists': [x[:2] if x and n else x for x in lists], 'text': ['t', None, 'u', '']})
        pyarrow.parquet.write_table(rows, f'{n}.parquet')
    expected = {'0.parquet:1': ['a', 'b', 'c', 't'], '0.parquet:2': ['d', '', '', ''], '0.parquet:3': ['', '', '', 'u'],
                '0.parquet:4': ['', '', 'e', ''], '1.parquet:1': ['a', 'b', '', 't'], '1.parquet:2': ['d', '', '', ''],
                '1.parquet:3': ['', '', '', 'u']}
    for captions, keys in (('lists', ['0', '1', '2']),
                           ({'en': 'lists', 'raw': 'text'}, ['en_0', 'en_1', 'en_2', 'raw'])):
        out = keys[0]
        found = {row['sample_id']: [row[f'caption.{key}'] for key in keys]
                 for row in _written(table('*.parquet', captions), out)}
        with_captions = {name: texts[:len(keys)] for name, texts in expected.items() if any(texts[:len(keys)])}
        assert found == with_captions and _card(out)['dropped'] == {'no caption': 8 - len(with_captions)}


@pytest.mark.parametrize('kind', ['paths', 'bytes'])
def test_all_rows_of_an_image_are_in_one_split(kind: str) -> None:
    """Two rows per image, whose paths are spelled differently; another table of other images changes nothing."""
    Path('x').mkdir()
    images = _write_pictures(15, 8)
    paths = [f'{"./x/../" if i > 14 else ""}{i % 15}.png' for i in range(30)]
    column = paths if kind == 'paths' else images * 2
    rows = pyarrow.table({'img': column, 'text': [f'{i}' for i in range(30)]})
    pyarrow.parquet.write_table(rows, 'a.parquet')
    pyarrow.parquet.write_table(rows.slice(3, 9), 'b.parquet')

    def sides(name: str, seed: int = 0) -> dict[int, str]:
        splits, _ = table(name, 'text', 'img', '.', holdout=0.4, seed=seed)
        return {int(sample.captions['0']): split for split, parts in splits.items() for part in parts
                for sample in part.read(Dropped())}

    found = sides('a.parquet')
    assert len(found) == 30 and set(found.values()) == {'train', 'val'} and found != sides('a.parquet', seed=1)
    assert all(found[i] == found[i + 15] for i in range(15))
    assert sides('b.parquet') == {i: found[i] for i in range(3, 12)}


def test_missing_images_are_named_and_read_once_they_are_there() -> None:
    Path('rows.csv').write_text('img,text\n0.png,a\n1.png,b\n,c\n')
    _write_pictures(1)
    source = table('rows.csv', 'text', 'img', images='.')
    reasons = '1 missing image file, such as .*/1.png; 1 no image, such as rows.csv:3'
    with refused_at('out/left_out.csv', f'2 of 3 .*{reasons}'):
        _written(source)
    images = _write_pictures(2)
    assert [row['image'] for row in _written(source)] == images


def test_a_table_is_filtered_and_sampled() -> None:
    """The card counts all rows, also over two splits."""
    rows = [{'id': f'r{i}', 'text': f't{i}', 'score': None if i == 7 else i / 40, 'language': 'en' if i % 4 else 'de'}
            for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), 'a.parquet')
    source = table('a.parquet', 'text', id_column='id', holdout=0.3, sample=0.7,
                   filters={'language': {'values': ['en']}, 'score': {'min': 0.1}})
    found = _written(source)
    sampled = {i for i in range(40) if xxhash.xxh64_intdigest(f'sample r{i}') / 2**64 < 0.7}
    english = {i for i in sampled if i % 4}
    scored = english - {1, 2, 3, 7}
    expected = {'not in the sample': 40 - len(sampled), 'filter language': len(sampled) - len(english),
                'filter score': len(english & {1, 2, 3, 7})}
    assert all(expected.values()) and _card()['filtered'] == expected
    assert _card()['read'] == 40 and {row['sample_id'] for row in found} == {f'r{i}' for i in scored}


@pytest.fixture
def saved(datasets: Any) -> None:
    """Six images with up to three captions, and a German one for every second; the third has none."""
    rows = {'image': [{'bytes': picture(i), 'path': None} for i in range(6)],
            'captions': [[f'{k} of {i}' for k in range(i % 3 + 1)] if i != 2 else [] for i in range(6)],
            'de': [f'de {i}' if i % 2 else None for i in range(6)], 'name': [f'n{i}' for i in range(6)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
    dataset.save_to_disk('one')
    # Rows in another order than they are stored in.
    splits = {'validation': dataset.select([5, 0, 1]), 'test': dataset}
    datasets.DatasetDict(splits).save_to_disk('several')


def test_a_saved_dataset(saved: None) -> None:
    source = huggingface('one', {'en': 'captions', 'de': 'de'}, 'image', id_column='name')
    rows = _written(source)
    assert [row['sample_id'] for row in rows] == ['n0', 'n1', 'n3', 'n4', 'n5']
    assert [row['image'] for row in rows] == [picture(i) for i in (0, 1, 3, 4, 5)]
    assert [row['caption.en_1'] for row in rows] == ['', '1 of 1', '', '1 of 4', '1 of 5']
    assert [row['caption.de'] for row in rows] == ['', 'de 1', 'de 3', '', 'de 5']
    assert _card()['dropped_ids'] == {'no caption': ['n2']}


def test_a_split_of_a_saved_dataset(
    saved: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('llm2clip.data.convert.table._ROWS', 2)  # in two parts
    rows = _written(huggingface('several', 'captions', 'image', split='validation'))
    assert "source.split: of validation, test, only 'validation' is read" in capsys.readouterr().out
    assert [(row['sample_id'], row['caption.0']) for row in rows] == [
        ('validation:1', '0 of 5'), ('validation:2', '0 of 0'), ('validation:3', '0 of 1')]
    assert 'caption.2' in rows[0] and len(list(Path('out/validation').glob('part-*'))) == 2
    with refused_at('source.split'):
        huggingface('several', 'captions')


def test_a_local_folder_of_the_library(datasets: Any) -> None:
    write_images(Path('photos'), [f'{i}.png' for i in range(3)])
    Path('photos/metadata.csv').write_text('file_name,text\n' + ''.join(f'{i}.png,text {i}\n' for i in range(3)))
    rows = _written(huggingface('photos', {'short': 'text'}, 'image'))
    assert [(row['caption.short'], row['image']) for row in rows] == [(f'text {i}', picture(i)) for i in range(3)]


def test_a_path_without_dataset_is_named(datasets: Any) -> None:
    for path in ('photos', 'csv'):  # by `csv`, the library would read any files of the working directory
        with refused_at('source.path'):
            huggingface(path, 'text')
    Path('empty').mkdir()
    with refused_at('source.path: empty'):
        huggingface('empty', 'text')
