# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr8k, Flickr30k, COCO and their Chinese captions, in each of the files in which they are published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import refused_at
from set_files import (
    FLICKR8K,
    coco,
    coco_cn,
    five,
    flickr8k,
    flickr8k_captions,
    flickr8k_kaggle,
    flickr8k_karpathy,
    flickr30k,
    flickr_cn,
    write_images,
)

from llm2clip.config import WriterConfig
from llm2clip.data.convert.samples import Sample
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples
from llm2clip.errors import ConfigError
from llm2clip.registry import build_source

pytestmark = pytest.mark.usefixtures('no_leftovers', 'here')
Arguments = dict[str, Any]


def _read(**source: Any) -> dict[str, list[Sample]]:
    """The samples of each split, without writing them."""
    splits, dropped = build_source(source)
    return {split: [sample for part in parts for sample in part.read(dropped)] for split, parts in splits.items()}


def _captions(samples: list[Sample]) -> dict[str, list[str]]:
    return {sample.sample_id: [text for text in sample.captions.values() if text] for sample in samples}


def _official(folder: Path) -> Arguments:
    """Kaggle's layout with lists of the splits."""
    flickr8k(folder)
    return {**flickr8k_kaggle(folder), 'split_files': {
        split: f'{folder}/Flickr_8k.{name}Images.txt'
        for split, name in (('train', 'train'), ('val', 'dev'), ('test', 'test'))}}


@pytest.mark.parametrize('write', [flickr8k, flickr8k_karpathy, _official])
def test_every_split_has_its_images_and_captions(write: Callable[[Path], Arguments]) -> None:
    arguments = write(Path())
    found = _read(name='flickr8k', **arguments)
    captions = _read(name='flickr8k', **{**arguments, 'images': None})
    assert {*found} == {'train', 'val', 'test'}
    for split, samples in found.items():
        expected = {name: flickr8k_captions(name) for name, of in FLICKR8K.items() if of == split}
        assert _captions(samples) == _captions(captions[split]) == expected
        assert [sample.image for sample in samples] == [
            Path(arguments['images'], sample.sample_id).read_bytes() for sample in samples]
        assert not any(sample.image for sample in captions[split])


def test_the_damaged_name_of_flickr8k_is_counted() -> None:
    arguments = flickr8k(Path())
    for name, more, expected in (
        # The last one of them has an image, which no list names.
        ('lists', {}, {'in no split': ['1007320043_627395c3d8.jpg', '2258277193_586949ec62.jpg.1']}),
        ('all', {'split_files': {}},
         {'missing image file': [f'{Path.cwd()}/Flicker8k_Dataset/2258277193_586949ec62.jpg.1']}),
    ):
        splits, dropped = build_source({'name': 'flickr8k', **arguments, **more})
        written = write_splits(splits, dropped, name, WriterConfig(max_dropped=0.2))
        assert written == ({'train': 6} if more else {'train': 2, 'val': 1, 'test': 2})
        assert json.loads(Path(name, 'dataset.json').read_text())['dropped_ids'] == expected


def test_captions_without_splits_are_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('llm2clip.data.convert.image_folder._IMAGES_PER_PART', 4)  # in two parts
    arguments = {'name': 'flickr8k', **flickr8k_kaggle(Path())}
    found = _read(**arguments)
    assert {split: list(_captions(samples).items()) for split, samples in found.items()} == {
        'train': [(name, flickr8k_captions(name)) for name in FLICKR8K]}
    held = _read(**arguments, split='all', holdout=2)
    assert {split: len(samples) for split, samples in held.items()} == {'all': 4, 'val': 2}
    assert {**_captions(held['all']), **_captions(held['val'])} == _captions(found['train'])


def test_restval_is_part_of_train_and_coco_keeps_all_captions() -> None:
    arguments = coco(Path())
    splits, dropped = build_source({'name': 'coco', **arguments})
    assert write_splits(splits, dropped, 'out') == {'test': 2, 'train': 2}
    train, test = (read_samples(f'out/{split}') for split in ('train', 'test'))
    assert [row['sample_id'] for row in train] == ['train2014/COCO_train2014_000000057870.jpg',
                                                   'val2014/COCO_val2014_000000522418.jpg']
    assert [[row[f'caption.{key}'] for key in range(6)] for row in test] == [
        [f'picture 391895, {k}' for k in range(6)], [*(f'picture 60623, {k}' for k in range(5)), '']]
    assert [row['caption.5'] for row in train] == ['', '']
    with pytest.raises(ConfigError, match="source.splits: there is no 'restval' in .*; it has test, train"):
        build_source({'name': 'coco', **arguments, 'splits': ['restval']})


@pytest.mark.parametrize(['file', 'split'], [('captions_val2017.json', 'val'), ('latest.json', 'train')])
def test_the_format_of_coco_may_have_captions_in_any_order(file: str, split: str) -> None:
    """An image may have no caption."""
    names = [f'{number:012}.jpg' for number in (9, 25, 30)]
    write_images(Path('train2017'), names)
    annotations = [{'id': k, 'image_id': number, 'caption': f'picture {number}, {k} \n'}
                   for k in range(7) for number in (25, 9) if k < 5 or number == 9]
    Path(file).write_text(json.dumps({
        'info': {}, 'images': [{'id': int(name[:-4]), 'file_name': name} for name in names],
        'annotations': annotations}))
    splits, dropped = build_source({'name': 'coco', 'images': 'train2017', 'annotations': file})
    assert write_splits(splits, dropped, 'out', WriterConfig(max_dropped=0.5)) == {split: 2}
    assert [[row['sample_id'], *(row[f'caption.{key}'] for key in range(7))]
            for row in read_samples(f'out/{split}')] == [
        [names[0], *(f'picture 9, {k}' for k in range(7))], [names[1], *(f'picture 25, {k}' for k in range(5)), '', '']]
    card = json.loads(Path('out/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption': [names[2]]}


@pytest.mark.parametrize(['lines', 'captions'], [
    # As Kaggle's files: a caption with commas has quotes.
    (['1.jpg,"A ""dog"" , or so"', '1.jpg,A dog'], ['A "dog" , or so', 'A dog']),
    # As CLIP_benchmark's: nothing has, unless the caption itself begins with one.
    (['1.jpg,"Dog" , says , he', '1.jpg,A dog , or so'], ['"Dog" , says , he', 'A dog , or so']),
])
def test_captions_with_commas_and_quotes(lines: list[str], captions: list[str]) -> None:
    Path('test.txt').write_text('\n'.join(['image,caption', *lines]) + '\n')
    found = _read(name='flickr8k', images=None, annotations='test.txt')
    assert _captions(found['test']) == {'1.jpg': captions}


TEST = ['1007129816.jpg', '1009434119.jpg']
ROWS = ['"' + json.dumps(five(name)).replace('"', '""') + f'","[0, 1, 2, 3, 4]",{split},{name},0\n'
        for name, split in (('10002456.jpg', 'val'), *((name, 'test') for name in TEST))]
FLICKR30K_FILES = {
    'flickr_annotations_30k.csv': 'raw,sentids,split,filename,img_id\n' + ''.join(ROWS),
    'flickr30k_test.json': json.dumps([{'image': name, 'caption': [' ', *five(name)]} for name in TEST]),
    'flickr30k_test_captions.json': json.dumps([{'image': name, 'caption': c} for name in TEST for c in five(name)]),
    'flickr30k_test_karpathy.txt': 'image,caption\n' + ''.join(f'{name},{c}\n' for name in TEST for c in five(name)),
    'flickr30k_test.token': ''.join(f'{name}#{i}\t{c}\n' for name in TEST for i, c in enumerate(five(name))),
}


@pytest.mark.parametrize('file', FLICKR30K_FILES)
def test_other_files_of_flickr30k_have_the_same_test_split(file: str) -> None:
    """Blank captions take no key."""
    arguments = {'name': 'flickr30k', **flickr30k(Path()), 'splits': ['test']}
    expected = _read(**arguments)
    Path(file).write_text(FLICKR30K_FILES[file])
    arguments['annotations'] = file
    if not file.endswith('.csv'):
        del arguments['splits']
    found = _read(**arguments)
    assert found == expected and _captions(found['test']) == {name: five(name) for name in TEST}


@pytest.mark.parametrize(['file', 'lines'], [
    ('flickr30k_test_zh.txt', ['image,caption', '1009692167.jpg,一条狗站在JohnA.Noble前。', '1021439420.jpg,两条狗']),
    ('plain.txt', ['1009692167 一条狗站在JohnA.Noble前。', '1021439420\t两条狗']),
    ('headless.txt', ['1009692167.jpg,一条狗站在JohnA.Noble前。', '1021439420.jpg,两条狗']),
])
def test_files_of_flickr_cn(file: str, lines: list[str]) -> None:
    arguments = {'name': 'flickr_cn', **flickr_cn(Path())}
    found = _read(**arguments)
    assert _captions(found['test']) == {
        f'{number}.jpg': [f'第{k}条狗坐在{number}。' for k in range(5)] for number in (1009692167, 1021439420)}
    Path(file).write_text('\n'.join(lines) + '\n')
    found = _read(**{**arguments, 'annotations': file})
    assert _captions(found['test']) == {'1009692167.jpg': ['一条狗站在JohnA.Noble前。'], '1021439420.jpg': ['两条狗']}


def test_coco_cn_in_the_order_of_its_splits() -> None:
    arguments = {'name': 'coco_cn', **coco_cn(Path())}
    found = _read(**arguments)
    assert {split: _captions(samples) for split, samples in found.items()} == {
        'train': {'train2014/COCO_train2014_000000573854.jpg': ['飞机正准备起飞。']},
        'test': {'val2014/COCO_val2014_000000461245.jpg': ['一群长颈鹿。', '一群长颈鹿站在树边'],
                 'train2014/COCO_train2014_000000503310.jpg': ['座位空空的。']}}
    assert [*_read(**arguments, splits=['test'])] == ['test']
    split = Path(arguments['annotations'], 'coco-cn_test.txt')
    captions = split.with_name('imageid.human-written-caption.txt')
    for ids, place in ((split.read_text() * 2, captions), ('000000461245\n', f'{split}:1')):
        split.write_text(ids)
        with refused_at(place):
            _read(**arguments)
