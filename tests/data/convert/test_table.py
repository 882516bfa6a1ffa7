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

from llm2clip.config import WriterConfig
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.table import huggingface, table
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples

Rows = list[dict[str, Any]]


def _written(source: Any, out: Path) -> Rows:
    """Samples of all splits of a source, half of which may be unusable."""
    written = write_splits(*source, out, WriterConfig(max_dropped=0.5))
    return [row for split in written or {} for row in read_samples(out / split)]


def _card(out: Path) -> dict[str, Any]:
    return json.loads((out / 'dataset.json').read_text())


@pytest.mark.parametrize('kind', ['bytes', 'struct', 'csv'])
def test_images_of_a_table_are_bytes_structs_or_paths(kind: str, tmp_path: Path) -> None:
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
    found = _written(table(f'{tmp_path}/{name}', captions, 'img', images=str(tmp_path)), tmp_path / 'out')
    assert found == [{'sample_id': f'{name}:{i + 1}', 'image': image, 'caption.raw': f'raw "{i}",\nor so',
                      'caption.long': f'{i}'} for i, image in enumerate(images)]


def test_columns_of_lists_become_keys(tmp_path: Path) -> None:
    lists = [['a', 'b', 'c'], ['d'], None, [None, ' ', 'e']]
    for n in range(2):  # the longest list is in one of two tables
        rows = pyarrow.table({'lists': [x[:2] if x and n else x for x in lists], 'text': ['t', None, 'u', '']})
        pyarrow.parquet.write_table(rows, tmp_path / f'{n}.parquet')
    expected = {'0.parquet:1': ['a', 'b', 'c', 't'], '0.parquet:2': ['d', '', '', ''], '0.parquet:3': ['', '', '', 'u'],
                '0.parquet:4': ['', '', 'e', ''], '1.parquet:1': ['a', 'b', '', 't'], '1.parquet:2': ['d', '', '', ''],
                '1.parquet:3': ['', '', '', 'u']}
    for captions, keys in (('lists', ['0', '1', '2']),
                           ({'en': 'lists', 'raw': 'text'}, ['en_0', 'en_1', 'en_2', 'raw'])):
        out = tmp_path / keys[0]
        found = {row['sample_id']: [row[f'caption.{key}'] for key in keys]
                 for row in _written(table(f'{tmp_path}/*.parquet', captions), out)}
        with_captions = {name: texts[:len(keys)] for name, texts in expected.items() if any(texts[:len(keys)])}
        assert found == with_captions and _card(out)['dropped'] == {'no caption': 8 - len(with_captions)}


@pytest.mark.parametrize('kind', ['paths', 'bytes'])
def test_all_rows_of_an_image_are_in_one_split(kind: str, tmp_path: Path) -> None:
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


def test_missing_images_are_named_and_read_once_they_are_there(tmp_path: Path) -> None:
    (tmp_path / 'rows.csv').write_text('img,text\n0.png,a\n1.png,b\n,c\n')
    (tmp_path / '0.png').write_bytes(picture(0))
    source = table(f'{tmp_path}/rows.csv', 'text', 'img', images=str(tmp_path))
    reasons = f'1 missing image file, such as {tmp_path}/1.png; 1 no image, such as rows.csv:3'
    with refused_at(tmp_path / 'out/left_out.csv', f'2 of 3 .*{reasons}'):
        _written(source, tmp_path / 'out')
    (tmp_path / '1.png').write_bytes(picture(1))
    assert [row['image'] for row in _written(source, tmp_path / 'out')] == [picture(0), picture(1)]


def test_a_table_is_filtered_and_sampled(tmp_path: Path) -> None:
    """The card counts all rows, also over two splits."""
    rows = [{'id': f'r{i}', 'text': f't{i}', 'score': None if i == 7 else i / 40, 'language': 'en' if i % 4 else 'de'}
            for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    source = table(f'{tmp_path}/a.parquet', 'text', id_column='id', holdout=0.3, sample=0.7,
                   filters={'language': {'values': ['en']}, 'score': {'min': 0.1}})
    found = _written(source, tmp_path / 'out')
    sampled = {i for i in range(40) if xxhash.xxh64_intdigest(f'sample r{i}') / 2**64 < 0.7}
    english = {i for i in sampled if i % 4}
    scored = english - {1, 2, 3, 7}
    expected = {'not in the sample': 40 - len(sampled), 'filter language': len(sampled) - len(english),
                'filter score': len(english & {1, 2, 3, 7})}
    assert all(expected.values()) and _card(tmp_path / 'out')['filtered'] == expected
    assert _card(tmp_path / 'out')['read'] == 40 and {row['sample_id'] for row in found} == {f'r{i}' for i in scored}


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip('datasets', reason='the package datasets is not installed')
    monkeypatch.setattr(library.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setattr(library.config, 'HF_HUB_OFFLINE', True)
    return library


@pytest.fixture
def saved(datasets: Any, tmp_path: Path) -> Path:
    """Six images with up to three captions, and a German one for every second; the third has none."""
    rows = {'image': [{'bytes': picture(i), 'path': None} for i in range(6)],
            'captions': [[f'{k} of {i}' for k in range(i % 3 + 1)] if i != 2 else [] for i in range(6)],
            'de': [f'de {i}' if i % 2 else None for i in range(6)], 'name': [f'n{i}' for i in range(6)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
    dataset.save_to_disk(tmp_path / 'one')
    # Rows in another order than they are stored in.
    splits = {'validation': dataset.select([5, 0, 1]), 'test': dataset}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / 'several')
    return tmp_path


def test_a_saved_dataset(saved: Path) -> None:
    source = huggingface(f'{saved}/one', {'en': 'captions', 'de': 'de'}, 'image', id_column='name')
    rows = _written(source, saved / 'out')
    assert [row['sample_id'] for row in rows] == ['n0', 'n1', 'n3', 'n4', 'n5']
    assert [row['image'] for row in rows] == [picture(i) for i in (0, 1, 3, 4, 5)]
    assert [row['caption.en_1'] for row in rows] == ['', '1 of 1', '', '1 of 4', '1 of 5']
    assert [row['caption.de'] for row in rows] == ['', 'de 1', 'de 3', '', 'de 5']
    assert _card(saved / 'out')['dropped_ids'] == {'no caption': ['n2']}


def test_a_split_of_a_saved_dataset(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('llm2clip.data.convert.table._ROWS', 2)  # in two parts
    rows = _written(huggingface(f'{saved}/several', 'captions', 'image', split='validation'), saved / 'out')
    assert "source.split: of validation, test, only 'validation' is read" in capsys.readouterr().out
    assert [(row['sample_id'], row['caption.0']) for row in rows] == [
        ('validation:1', '0 of 5'), ('validation:2', '0 of 0'), ('validation:3', '0 of 1')]
    assert 'caption.2' in rows[0] and len(list((saved / 'out/validation').glob('part-*'))) == 2
    with refused_at('source.split'):
        huggingface(f'{saved}/several', 'captions')


def test_a_local_folder_of_the_library(datasets: Any, tmp_path: Path) -> None:
    folder = tmp_path / 'photos'
    folder.mkdir()
    for i in range(3):
        (folder / f'{i}.png').write_bytes(picture(i))
    (folder / 'metadata.csv').write_text('file_name,text\n' + ''.join(f'{i}.png,text {i}\n' for i in range(3)))
    rows = _written(huggingface(str(folder), {'short': 'text'}, 'image'), tmp_path / 'out')
    assert [(row['caption.short'], row['image']) for row in rows] == [(f'text {i}', picture(i)) for i in range(3)]


def test_a_path_without_dataset_is_named(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ('photos', 'csv'):  # by `csv`, the library would read any files of the working directory
        with refused_at('source.path'):
            huggingface(path, 'text')
    (tmp_path / 'empty').mkdir()
    with refused_at('source.path: empty'):
        huggingface('empty', 'text')
