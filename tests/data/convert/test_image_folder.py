# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A folder of images with a caption file, in each of its formats, and captions alone."""

import json
from pathlib import Path

import pytest
import set_files
from refusals import refused_at

from llm2clip.data.convert.image_folder import caption_csv, image_folder
from llm2clip.data.convert.samples import Dropped, Part, Sample

ROWS = [('a.png', 'red, round'), ('b/c.png', 'blue'), ('a.png', 'a ball')]
OBJECTS = [{'image': image, 'caption': caption} for image, caption in ROWS]
CAPTION_FILES = {
    'captions.csv': '\ufeffimage,caption\n' + ''.join(f'\n{image},"{caption}"\n' for image, caption in ROWS),
    'spaces.csv': 'image , caption,\n' + ''.join(f' {image},"\u00a0{caption} ",\n , ,\n' for image, caption in ROWS),
    'semicolons.csv': '\nimage;caption\n' + ''.join(f'{image};{caption}\n;\n' for image, caption in ROWS),
    'tabs.csv': 'caption\timage\n' + ''.join(f'{caption}\t{image}\n' for image, caption in ROWS),
    'captions.tsv': 'n\tcaption\timage\n' + ''.join(f'1\t{caption}\t{image}\n' for image, caption in ROWS),
    'captions.json': json.dumps(OBJECTS),
    'captions.jsonl': '\n'.join(map(json.dumps, OBJECTS)) + '\n\n',
    'lists.json': json.dumps([{'image': 'a.png', 'caption': ['red, round', 'a ball']}, OBJECTS[1]]),
}


def _read(parts: list[Part]) -> list[Sample]:
    return [sample for part in parts for sample in part.read(Dropped())]


@pytest.mark.parametrize('file', CAPTION_FILES)
def test_an_image_has_as_many_keys_as_the_one_with_most_captions(file: str, tmp_path: Path) -> None:
    images = set_files.image_folder(tmp_path)['images']
    (tmp_path / file).write_text(CAPTION_FILES[file])
    splits, _ = image_folder(images, f'{tmp_path}/{file}')
    assert [(sample.sample_id, sample.captions) for sample in _read(splits['train'])] == [
        ('a.png', {'0': 'red, round', '1': 'a ball'}), ('b/c.png', {'0': 'blue', '1': ''})]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    images, csv = set_files.image_folder(tmp_path)['images'], f'{tmp_path}/c.csv'
    Path(csv).write_text('file,text\na.png,red\n')
    sample, = _read(image_folder(images, csv, 'file', 'text')[0]['train'])
    assert sample.captions == {'0': 'red'}
    with refused_at('nowhere.csv'):
        image_folder(images, 'nowhere.csv')


@pytest.mark.parametrize('with_images', [True, False])
def test_rows_without_an_image_are_counted(with_images: bool, tmp_path: Path) -> None:
    images, csv = set_files.image_folder(tmp_path)['images'], f'{tmp_path}/c.csv'
    Path(csv).write_text('image,caption\na.png,red\n,blue\n,\n ,green\n')
    splits, _ = image_folder(images, csv) if with_images else caption_csv(csv)
    dropped = Dropped()
    samples = [sample for part in splits['train'] for sample in part.read(dropped)]
    assert [sample.captions for sample in samples] == [{'0': 'red'}]
    assert dropped.reasons == {'no image': [f'{csv}:3', f'{csv}:5']}


def test_all_spellings_of_a_path_are_one_image(tmp_path: Path) -> None:
    path = tmp_path / 'captions.csv'
    path.write_text('image,caption\n' + ''.join(f'{i}.png,a\n./{i}.png,b\nx/../{i}.png, \n' for i in range(40)))
    splits, _ = caption_csv(str(path), holdout=0.3)
    samples = _read(splits['train']) + _read(splits['val'])
    assert {sample.sample_id for sample in samples} == {f'{i}.png' for i in range(40)} and len(samples) == 40
    assert all(sample.captions == {'0': 'a', '1': 'b'} and sample.image is None for sample in samples)
