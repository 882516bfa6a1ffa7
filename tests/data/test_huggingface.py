# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets of Hugging Face's library: saved ones, folders of images, and Parquet files."""

import json
from pathlib import Path

import pytest
from parts import picture

from llm2clip.config import WriterConfig
from llm2clip.data.convert.table import huggingface
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples
from llm2clip.errors import ConfigError, FileError

datasets = pytest.importorskip('datasets', reason='the package datasets is not installed')


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
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


def _write(folder: Path, *arguments: object, **options: object) -> list[dict[str, object]]:
    splits, dropped = huggingface(*arguments, **options)  # type: ignore[arg-type]
    written = write_splits(splits, dropped, folder, WriterConfig(max_dropped=0.5))
    return [row for split in written or {} for row in read_samples(folder / split)]


def test_a_saved_dataset(saved: Path) -> None:
    rows = _write(saved / 'out', f'{saved}/one', {'en': 'captions', 'de': 'de'}, 'image', id_column='name')
    assert [row['sample_id'] for row in rows] == ['n0', 'n1', 'n3', 'n4', 'n5']
    assert [row['image'] for row in rows] == [picture(i) for i in (0, 1, 3, 4, 5)]
    assert [row['caption.en_1'] for row in rows] == ['', '1 of 1', '', '1 of 4', '1 of 5']
    assert [row['caption.de'] for row in rows] == ['', 'de 1', 'de 3', '', 'de 5']
    assert json.loads((saved / 'out/dataset.json').read_text())['dropped_ids'] == {'no caption': ['n2']}


def test_a_split_of_a_saved_dataset(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('llm2clip.data.convert.table._ROWS', 2)  # in two parts
    rows = _write(saved / 'out', f'{saved}/several', 'captions', 'image', split='validation')
    assert "source.split: of validation, test, only 'validation' is read" in capsys.readouterr().out
    assert [row['caption.0'] for row in rows] == ['0 of 5', '0 of 0', '0 of 1']
    assert [row['sample_id'] for row in rows] == ['validation:1', 'validation:2', 'validation:3']
    assert 'caption.2' in rows[0] and len(list((saved / 'out/validation').glob('part-*'))) == 2
    with pytest.raises(ConfigError, match="source.split: there is no 'train' in .*several; it has validation"):
        huggingface(f'{saved}/several', 'captions')


@pytest.mark.parametrize('kind', ['images', 'parquet'])
def test_a_local_folder(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / 'photos'
    folder.mkdir()
    if kind == 'images':
        for i in range(3):
            (folder / f'{i}.png').write_bytes(picture(i))
        (folder / 'metadata.csv').write_text('file_name,text\n' + ''.join(f'{i}.png,text {i}\n' for i in range(3)))
    else:
        rows = {'image': [{'bytes': picture(i), 'path': f'{i}.png'} for i in range(3)],
                'text': [f'text {i}' for i in range(3)]}
        datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image()).to_parquet(folder / 'rows.parquet')
    rows = _write(tmp_path / 'out', str(folder), {'short': 'text'}, 'image')
    assert [(row['caption.short'], row['image']) for row in rows] == [(f'text {i}', picture(i)) for i in range(3)]


def test_what_is_no_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Also a name by which the library would read any files of the working directory.
    for path in ('photos', 'csv', 'pandas'):
        with pytest.raises(ConfigError, match=f'source.path: there is no folder {tmp_path}/{path}, and a dataset of'):
            huggingface(path, 'text')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileError, match='source.path: empty: cannot be read .*, expected a dataset'):
        huggingface('empty', 'text')
