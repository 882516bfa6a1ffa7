# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr8k, Flickr30k and COCO in their published layouts: the sources write what the evaluation sets read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from set_files import (
    FLICKR8K,
    coco,
    flickr8k,
    flickr8k_captions,
    flickr8k_kaggle,
    flickr8k_karpathy,
    flickr30k,
    write_images,
)

from llm2clip.config import WriterConfig
from llm2clip.data.convert import image_folder
from llm2clip.data.convert.samples import Dropped, Sample
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples
from llm2clip.errors import ConfigError
from llm2clip.registry import build_source, open_set

pytestmark = pytest.mark.usefixtures('no_leftovers')
Arguments = dict[str, Any]


def _read(**source: Any) -> tuple[dict[str, list[Sample]], Dropped]:
    """The samples of each split, without writing them, and what was left out."""
    splits, dropped = build_source(source)
    return {split: [sample for part in parts for sample in part.read(dropped)]
            for split, parts in splits.items()}, dropped


def _captions(samples: list[Sample]) -> dict[str, list[str]]:
    return {sample.sample_id: [text for text in sample.captions.values() if text] for sample in samples}


def _official(folder: Path) -> Arguments:
    """Kaggle's layout with lists of the splits."""
    flickr8k(folder)
    return {**flickr8k_kaggle(folder), 'split_files': {
        split: f'{folder}/Flickr_8k.{name}Images.txt'
        for split, name in (('train', 'train'), ('val', 'dev'), ('test', 'test'))}}


LAYOUTS: list[tuple[str, Callable[[Path], Arguments], dict[str, int]]] = [
    ('flickr8k', flickr8k, {'train': 2, 'val': 1, 'test': 2}),
    ('flickr8k', flickr8k_karpathy, {'train': 2, 'val': 1, 'test': 2}),
    ('flickr8k', _official, {'train': 2, 'val': 1, 'test': 2}),
    ('flickr30k', flickr30k, {'train': 1, 'val': 1, 'test': 2}),
    ('coco', lambda folder: {**coco(folder), 'splits': ['test']}, {'test': 2}),
]


@pytest.mark.parametrize(['name', 'write', 'sizes'], LAYOUTS, ids=[f'{i}-{row[0]}' for i, row in enumerate(LAYOUTS)])
def test_source_and_set_read_the_same(
    name: str, write: Callable[[Path], Arguments], sizes: dict[str, int], tmp_path: Path
) -> None:
    arguments = write(tmp_path)
    found, _ = _read(name=name, **arguments)
    assert {split: len(samples) for split, samples in found.items()} == sizes
    captions, _ = _read(name=name, **{**arguments, 'images': None})
    arguments.pop('splits', None)
    for split, samples in found.items():
        every = {'captions_per_image': None} if name == 'coco' else {}
        expected = open_set('retrieval', {'name': name, **arguments, 'split': split, **every}, 'source')
        assert _captions(samples) == dict(zip(expected.image_ids, expected.captions)) == _captions(captions[split])
        assert [sample.image for sample in samples] == list(map(expected.read_image, range(len(samples))))
        assert not any(sample.image for sample in captions[split])
        if name == 'flickr8k':
            assert _captions(samples) == {name: flickr8k_captions(name) for name, of in FLICKR8K.items() if of == split}


def test_the_damaged_name_of_flickr8k_is_counted(tmp_path: Path) -> None:
    arguments = flickr8k(tmp_path)
    for name, more, expected in (
        # The last one of them has an image, which no list names.
        ('lists', {}, {'in no split': ['1007320043_627395c3d8.jpg', '2258277193_586949ec62.jpg.1']}),
        ('all', {'split_files': {}},
         {'missing image file': [f'{tmp_path}/Flicker8k_Dataset/2258277193_586949ec62.jpg.1']}),
    ):
        splits, dropped = build_source({'name': 'flickr8k', **arguments, **more})
        written = write_splits(splits, dropped, tmp_path / name, WriterConfig(max_dropped=0.2))
        assert written == ({'train': 6} if more else {'train': 2, 'val': 1, 'test': 2})
        assert json.loads((tmp_path / name / 'dataset.json').read_text())['dropped_ids'] == expected


def test_captions_without_splits_are_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, '_IMAGES', 4)  # in two parts
    arguments = {'name': 'flickr8k', **flickr8k_kaggle(tmp_path)}
    found, _ = _read(**arguments)
    assert {split: list(_captions(samples).items()) for split, samples in found.items()} == {
        'train': [(name, flickr8k_captions(name)) for name in FLICKR8K]}
    held, _ = _read(**arguments, split='all', holdout=2)
    assert {split: len(samples) for split, samples in held.items()} == {'all': 4, 'val': 2}
    assert {**_captions(held['all']), **_captions(held['val'])} == _captions(found['train'])


def test_restval_of_coco_is_a_part_of_train_and_all_captions_are_kept(tmp_path: Path) -> None:
    arguments = coco(tmp_path)
    splits, dropped = build_source({'name': 'coco', **arguments})
    assert write_splits(splits, dropped, tmp_path / 'out') == {'test': 2, 'train': 2}
    train, test = (read_samples(tmp_path / 'out' / split) for split in ('train', 'test'))
    assert [row['sample_id'] for row in train] == ['train2014/COCO_train2014_000000057870.jpg',
                                                   'val2014/COCO_val2014_000000522418.jpg']
    assert [[row[f'caption.{key}'] for key in range(6)] for row in test] == [
        [f'picture 391895, {k}' for k in range(6)], [*(f'picture 60623, {k}' for k in range(5)), '']]
    assert [row['caption.5'] for row in train] == ['', '']
    with pytest.raises(ConfigError, match="source.splits: there is no 'restval' in .*; it has test, train"):
        build_source({'name': 'coco', **arguments, 'splits': ['restval']})


def test_blank_captions_take_no_key(tmp_path: Path) -> None:
    (tmp_path / 'list.json').write_text(json.dumps([{'image': 'a.jpg', 'caption': [' ', 'a dog', ' ']}]))
    splits, _ = build_source({'name': 'flickr30k', 'annotations': f'{tmp_path}/list.json', 'images': None})
    assert [sample.captions for part in splits['train'] for sample in part.read(Dropped())] == [{'0': 'a dog'}]


@pytest.mark.parametrize(['file', 'split'], [('captions_val2017.json', 'val'), ('latest.json', 'train')])
def test_the_format_of_coco(file: str, split: str, tmp_path: Path) -> None:
    """Captions stand in another order than images, and an image may have none."""
    names = [f'{number:012}.jpg' for number in (9, 25, 30)]
    write_images(tmp_path / 'train2017', names)
    annotations = [{'id': k, 'image_id': number, 'caption': f'picture {number}, {k} \n'}
                   for k in range(7) for number in (25, 9) if k < 5 or number == 9]
    (tmp_path / file).write_text(json.dumps({
        'info': {}, 'images': [{'id': int(name[:-4]), 'file_name': name} for name in names],
        'annotations': annotations}))
    splits, dropped = build_source({'name': 'coco', 'images': f'{tmp_path}/train2017',
                                    'annotations': f'{tmp_path}/{file}'})
    assert write_splits(splits, dropped, tmp_path / 'out', WriterConfig(max_dropped=0.5)) == {split: 2}
    assert [[row['sample_id'], *(row[f'caption.{key}'] for key in range(7))]
            for row in read_samples(tmp_path / 'out' / split)] == [
        [names[0], *(f'picture 9, {k}' for k in range(7))], [names[1], *(f'picture 25, {k}' for k in range(5)), '', '']]
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption': [names[2]]}


def _karpathy(*images: tuple[str, str]) -> str:
    return json.dumps({'images': [{'filename': name, 'split': split, 'sentences': [{'raw': 'x'}]}
                                  for name, split in images]})


TOKEN = 'a.jpg#0\tx\nb.jpg#0\ty\n'
WRONG: list[tuple[str, str, Arguments, str]] = [
    ('k.json', _karpathy(('a.jpg', 'train')), {'splits': ['dev']},
     r"source\.splits: there is no 'dev' in k\.json; it has train$"),
    ('k.json', _karpathy(('a.jpg', 'train')), {'split': 'all'},
     r'source\.split: k\.json has the splits train; source\.splits says which'),
    ('k.json', _karpathy(('a.jpg', 'train'), ('a.jpg', 'test')), {}, r'k\.json: image a\.jpg occurs twice$'),
    ('k.csv', 'filename,split\na.jpg,train\n', {}, r"k\.csv:2 has no 'raw'; it has filename, split$"),
    ('t.token.txt', TOKEN, {}, r'source\.split_files: the lists .* are not beside t\.token\.txt, and without'),
    ('t.token.txt', 'a.jpg#0\tx\nb.jpg\n', {'split': 'train'},
     r't\.token\.txt:2: expected `<image>#<number><tab><caption>` or'),
]


@pytest.mark.parametrize(['file', 'content', 'arguments', 'words'], WRONG)
def test_what_is_wrong_is_said(
    file: str, content: str, arguments: Arguments, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path('photos'), ['a.jpg', 'b.jpg'])
    Path(file).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        _read(name='flickr8k', **{'images': 'photos', 'annotations': file, **arguments})
    assert '\n' not in str(error.value)
