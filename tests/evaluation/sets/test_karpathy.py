# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr8k, Flickr30k and COCO in each of the files that are in use."""

import csv
import io
import json
from pathlib import Path

import pytest
from set_files import FLICKR8K, five, flickr8k_captions, flickr8k_kaggle, flickr8k_karpathy, write_images
from set_files import coco as write_coco
from set_files import flickr8k as write_flickr8k
from set_files import flickr30k as write_flickr30k

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets.karpathy import coco, flickr8k, flickr30k

TEST = ['1007129816.jpg', '1009434119.jpg']


def test_flickr8k_is_one_set_in_all_of_its_layouts(tmp_path: Path) -> None:
    official = write_flickr8k(tmp_path)
    test = {'test': f'{tmp_path}/Flickr_8k.testImages.txt'}
    layouts = [official, flickr8k_karpathy(tmp_path), {**flickr8k_kaggle(tmp_path), 'split_files': test}]
    for arguments in layouts:
        found = flickr8k(**arguments)
        assert found.name == 'flickr8k' and found.image_ids == [name for name in FLICKR8K if FLICKR8K[name] == 'test']
        assert found.captions == [flickr8k_captions(name) for name in found.image_ids]
    for arguments in layouts[:2]:
        assert flickr8k(**arguments, split='val').image_ids == ['1002674143_1b742ab4b8.jpg']
        with pytest.raises(ConfigError, match=r"source.split: there is no 'dev' in .*; it has test, train, val$"):
            flickr8k(**arguments, split='dev')


def test_flickr8k_without_lists(tmp_path: Path) -> None:
    arguments = flickr8k_kaggle(tmp_path)
    with pytest.raises(ConfigError, match=r"captions.txt has no splits, and its name does not say 'test'; split: all "
                                          r'takes all of it, and split_files: {test: <file>} lists its images'):
        flickr8k(**arguments)
    found = flickr8k(**arguments, split='all')
    assert dict(zip(found.image_ids, found.captions)) == {name: flickr8k_captions(name) for name in FLICKR8K}


@pytest.mark.parametrize(['lines', 'captions'], [
    # As Kaggle's files: a caption with commas has quotes.
    (['1.jpg,"A ""dog"" , or so"', '1.jpg,A dog'], ['A "dog" , or so', 'A dog']),
    # As CLIP_benchmark's: nothing has, unless the caption itself begins with one.
    (['1.jpg,"Dog" , says , he', '1.jpg,A dog , or so'], ['"Dog" , says , he', 'A dog , or so']),
])
def test_captions_with_commas_and_quotes(lines: list[str], captions: list[str], tmp_path: Path) -> None:
    write_images(tmp_path, ['1.jpg'])
    (tmp_path / 'test.txt').write_text('\n'.join(['image,caption', *lines]) + '\n')
    assert flickr8k(str(tmp_path), f'{tmp_path}/test.txt').captions == [captions]


def test_flickr30k_by_karpathys_split(tmp_path: Path) -> None:
    arguments = write_flickr30k(tmp_path)
    found = flickr30k(**arguments)
    assert found.name == 'flickr30k' and found.image_ids == TEST and found.captions == [five(name) for name in TEST]
    assert flickr30k(**arguments, split='val').image_ids == ['10002456.jpg']
    with pytest.raises(ConfigError, match=r"there is no 'dev' in .*dataset_flickr30k.json; it has test, train, val"):
        flickr30k(**arguments, split='dev')


def _csv() -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(['raw', 'sentids', 'split', 'filename', 'img_id'])
    for i, (name, split) in enumerate([('10002456.jpg', 'val'), *((name, 'test') for name in TEST)]):
        writer.writerow([json.dumps(five(name)), json.dumps(list(range(5 * i, 5 * i + 5))), split, name, i])
    return out.getvalue()


FILES = {
    'flickr_annotations_30k.csv': _csv(),
    'flickr30k_test.json': json.dumps([{'image': name, 'caption': five(name)} for name in TEST]),
    'flickr30k_test_karpathy.txt': 'image,caption\n' + ''.join(f'{name},{c}\n' for name in TEST for c in five(name)),
    'flickr30k_test.token': ''.join(f'{name}#{i}\t{c}\n' for name in TEST for i, c in enumerate(five(name))),
}


@pytest.mark.parametrize('file', FILES)
def test_other_files_of_flickr30k_are_the_same_set(file: str, tmp_path: Path) -> None:
    arguments = write_flickr30k(tmp_path)
    expected = flickr30k(**arguments)
    (tmp_path / file).write_text(FILES[file])
    found = flickr30k(**{**arguments, 'annotations': f'{tmp_path}/{file}'})
    assert (found.image_ids, found.captions) == (expected.image_ids, expected.captions)
    assert found.read_image(1) == expected.read_image(1)


def test_a_file_without_splits_says_which_it_is(tmp_path: Path) -> None:
    arguments = write_flickr30k(tmp_path)
    path = tmp_path / 'results_20130124.token'
    path.write_text(FILES['flickr30k_test.token'])
    with pytest.raises(ConfigError, match=r"source.split: .*results_20130124.token has no splits, and its name does "
                                          "not say 'test'; split: all takes all of it"):
        flickr30k(**{**arguments, 'annotations': str(path)})
    assert flickr30k(**{**arguments, 'annotations': str(path)}, split='all').image_ids == TEST
    blip = tmp_path / 'flickr30k_test.json'
    blip.write_text(FILES['flickr30k_test.json'])
    with pytest.raises(ConfigError, match="does not say 'val'"):
        flickr30k(**{**arguments, 'annotations': str(blip)}, split='val')


def test_annotations_of_another_form_are_described(tmp_path: Path) -> None:
    arguments = write_flickr30k(tmp_path)
    for name, text, message in (
        ('a.csv', 'caption,split,filename\nA dog.,test,1.jpg\n', r"a.csv:2 has no 'raw'; it has caption, split"),
        ('c.json', '{"pictures": []}', r"c.json has no 'images'; it has pictures"),
        ('d.json', '{"images": [{"filename": "1.jpg", "split": "test"}]}',
         r"d.json, image 0 has no 'sentences'; it has filename, split"),
        ('test_2.txt', '1.jpg#0\tA dog.\n2.jpg\n', r'test_2.txt:2: expected `<image>#<number><tab><caption>`'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            flickr30k(**{**arguments, 'annotations': f'{tmp_path}/{name}'})


def test_coco_takes_five_captions_per_image(tmp_path: Path) -> None:
    arguments = write_coco(tmp_path)
    found = coco(**arguments)
    assert found.image_ids == ['val2014/COCO_val2014_000000391895.jpg', 'val2014/COCO_val2014_000000060623.jpg']
    assert found.captions == [[f'picture {number}, {k}' for k in range(5)] for number in (391895, 60623)]
    assert [len(captions) for captions in coco(**arguments, captions_per_image=None).captions] == [6, 5]
    assert coco(**arguments, split='train').image_ids == ['train2014/COCO_train2014_000000057870.jpg']
    with pytest.raises(ConfigError, match='it has restval, test, train'):
        coco(**arguments, split='val')


@pytest.mark.parametrize('form', ['blip', 'coco'])
def test_other_files_of_coco_are_the_same_set(form: str, tmp_path: Path) -> None:
    arguments = write_coco(tmp_path)
    expected = coco(**arguments, captions_per_image=None)
    rows = list(zip(expected.image_ids, expected.captions))
    path = tmp_path / 'coco_karpathy_test.json'
    if form == 'blip':
        path.write_text(json.dumps([{'image': image, 'caption': captions} for image, captions in rows]))
    else:
        ids = {image: int(image[-10:-4]) for image in expected.image_ids}
        path.write_text(json.dumps({
            'images': [{'id': ids[image], 'file_name': image.split('/')[1]} for image, _ in rows],
            # Not in the images' order.
            'annotations': [{'id': 7, 'image_id': ids[image], 'caption': f'{captions[k]} \n'}
                            for k in range(6) for image, captions in rows if k < len(captions)],
        }))
        arguments['images'] += '/val2014'
    found = coco(**{**arguments, 'annotations': str(path)}, captions_per_image=None)
    assert found.captions == expected.captions and found.read_image(1) == expected.read_image(1)
