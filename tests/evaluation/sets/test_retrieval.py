# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sets of images with captions: published ones in each of the files that are in use, and custom data."""

import csv
import io
import json
from pathlib import Path

import pytest
import set_files
from parts import picture, write_dataset
from set_files import conversation, five, write_images

from llm2clip.data.convert import image_folder as convert
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.writer import write_splits
from llm2clip.errors import ConfigError, FileError
from llm2clip.evaluation.sets.retrieval import (
    LANGUAGES,
    coco,
    coco_cn,
    docci,
    flickr8k,
    flickr30k,
    flickr_cn,
    image_folder,
    mds,
    sharegpt4v,
    urban1k,
    xm3600,
)

TEST = ['1007129816.jpg', '1009434119.jpg']


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
    arguments = set_files.flickr30k(tmp_path)
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


FLICKR30K_FILES = {
    'flickr_annotations_30k.csv': _csv(),
    'flickr30k_test.json': json.dumps([{'image': name, 'caption': five(name)} for name in TEST]),
    'flickr30k_test_captions.json': json.dumps([{'image': name, 'caption': c} for name in TEST for c in five(name)]),
    'flickr30k_test_karpathy.txt': 'image,caption\n' + ''.join(f'{name},{c}\n' for name in TEST for c in five(name)),
    'flickr30k_test.token': ''.join(f'{name}#{i}\t{c}\n' for name in TEST for i, c in enumerate(five(name))),
}


@pytest.mark.parametrize('file', FLICKR30K_FILES)
def test_other_files_of_flickr30k_are_the_same_set(file: str, tmp_path: Path) -> None:
    arguments = set_files.flickr30k(tmp_path)
    expected = flickr30k(**arguments)
    (tmp_path / file).write_text(FLICKR30K_FILES[file])
    found = flickr30k(**{**arguments, 'annotations': f'{tmp_path}/{file}'})
    assert (found.image_ids, found.captions) == (expected.image_ids, expected.captions)
    assert found.read_image(1) == expected.read_image(1)


def test_a_file_without_splits_says_which_it_is(tmp_path: Path) -> None:
    arguments = set_files.flickr30k(tmp_path)
    path = tmp_path / 'results_20130124.token'
    path.write_text(FLICKR30K_FILES['flickr30k_test.token'])
    with pytest.raises(ConfigError, match=r"source.split: .*results_20130124.token has no splits, and its name does "
                                          "not say 'test'; split: all takes all of it"):
        flickr30k(**{**arguments, 'annotations': str(path)})
    assert flickr30k(**{**arguments, 'annotations': str(path)}, split='all').image_ids == TEST
    blip = tmp_path / 'flickr30k_test.json'
    blip.write_text(FLICKR30K_FILES['flickr30k_test.json'])
    with pytest.raises(ConfigError, match="does not say 'val'"):
        flickr30k(**{**arguments, 'annotations': str(blip)}, split='val')


def test_coco_takes_five_captions_per_image(tmp_path: Path) -> None:
    arguments = set_files.coco(tmp_path)
    found = coco(**arguments)
    assert found.image_ids == ['val2014/COCO_val2014_000000391895.jpg', 'val2014/COCO_val2014_000000060623.jpg']
    assert found.captions == [[f'picture {number}, {k}' for k in range(5)] for number in (391895, 60623)]
    assert [len(captions) for captions in coco(**arguments, captions_per_image=None).captions] == [6, 5]
    assert coco(**arguments, split='train').image_ids == ['train2014/COCO_train2014_000000057870.jpg']
    with pytest.raises(ConfigError, match='it has restval, test, train'):
        coco(**arguments, split='val')


@pytest.mark.parametrize('form', ['blip', 'coco'])
def test_other_files_of_coco_are_the_same_set(form: str, tmp_path: Path) -> None:
    arguments = set_files.coco(tmp_path)
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


def test_sharegpt4v_is_the_first_answers(tmp_path: Path) -> None:
    arguments = set_files.sharegpt4v(tmp_path)
    found = sharegpt4v(**arguments)
    assert found.image_ids == ['sam/images/sa_545504.jpg', 'coco/train2017/000000000009.jpg',
                               'llava/llava_pretrain/images/00000/000000010.jpg']
    assert found.captions == [[f'In the photo, {i}. It is "so".'] for i in range(3)]
    with pytest.raises(ConfigError, match=r'1 of 4 images are missing, the first of them is .*/sam/images/sa_7.jpg; '
                                          r'.*/sam/images has sa_545504.jpg'):
        sharegpt4v(**{**arguments, 'first': 4})
    with pytest.raises(ValueError, match='1107.json has 4 values, expected at least 5'):
        sharegpt4v(**{**arguments, 'first': 5})
    record = conversation('sam/images/sa_545504.jpg', 'x')
    record['conversations'].pop()
    Path(arguments['annotations']).write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=r'1107.json, value 0: no turn of the conversation is from .gpt.'):
        sharegpt4v(**{**arguments, 'first': 1})


def test_urban1k_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    arguments = set_files.urban1k(tmp_path)
    (tmp_path / 'Urban1k/caption/2.txt').write_text('A street.\nA second line.')
    (tmp_path / 'Urban1k/image/.DS_Store').write_text('')
    found = urban1k(**arguments)
    assert found.image_ids == ['1.jpg', '2.jpg', '10.jpg']
    assert found.captions == [['A street, number 1.'], ['A street.'], ['A street, number 10.']]
    folder = Path(arguments['folder'])
    with pytest.raises(ConfigError, match=f'urban1k: source.folder: expected the folders image and caption in '
                                          f'{tmp_path}; {tmp_path} has Urban1k$'):
        urban1k(str(tmp_path))
    (folder / 'caption/10.txt').rename(folder / 'caption/7.txt')
    with pytest.raises(ConfigError, match=r'1 of 3 files in .*/image have none of the same name in .*/caption, the '
                                          'first of them is 10'):
        urban1k(str(folder))
    (folder / 'caption/7.txt').rename(folder / 'caption/10.json')
    with pytest.raises(ConfigError, match=r'expected only .txt files in .*/caption, found 10.json'):
        urban1k(str(folder))
    (folder / 'caption/10.json').unlink()
    (folder / 'caption/10.txt').write_text('')
    with pytest.raises(ValueError, match='urban1k: image 10.jpg has no caption'):
        urban1k(str(folder))


def test_docci_by_split(tmp_path: Path) -> None:
    arguments = set_files.docci(tmp_path)
    found = docci(**arguments)
    assert found.image_ids == ['test_00000.jpg', 'test_00001.jpg']
    assert found.captions == [['A view of test_00000.'], ['A view of test_00001.']]
    assert docci(**arguments, split='qual_dev').image_ids == ['qual_dev_00000.jpg']
    with pytest.raises(ConfigError, match="there is no 'qual_test' in .*; it has qual_dev, test, train"):
        docci(**arguments, split='qual_test')


@pytest.mark.parametrize(['file', 'lines'], [
    # The original package marks each word's part of speech.
    ('seg.flickr30kzhmbosontest.caption.txt',
     ['1009692167#zhm#1 一:m 条:q 狗:n 站:vi 在:p John:nx A:nx .:wj Noble:nx 前:f 。:wj',
      '1021439420#zhm#1 两:m 条:q 狗:n']),
    ('flickr30k_test_zh.txt', ['image,caption', '1009692167.jpg,一条狗站在JohnA.Noble前。', '1021439420.jpg,两条狗']),
    ('plain.txt', ['1009692167 一条狗站在JohnA.Noble前。', '1021439420\t两条狗']),
    ('headless.txt', ['1009692167.jpg,一条狗站在JohnA.Noble前。', '1021439420.jpg,两条狗']),
])
def test_files_of_flickr_cn(file: str, lines: list[str], tmp_path: Path) -> None:
    arguments = set_files.flickr_cn(tmp_path)
    found = flickr_cn(**arguments)
    assert found.captions == [[f'第{k}条狗坐在{number}。' for k in range(5)] for number in (1009692167, 1021439420)]
    (tmp_path / file).write_text('\n'.join(lines) + '\n')
    found = flickr_cn(arguments['images'], f'{tmp_path}/{file}')
    assert found.image_ids == ['1009692167.jpg', '1021439420.jpg']
    assert found.captions == [['一条狗站在JohnA.Noble前。'], ['两条狗']]


def test_coco_cn_in_the_order_of_its_split(tmp_path: Path) -> None:
    arguments = set_files.coco_cn(tmp_path)
    found = coco_cn(**arguments)
    assert found.image_ids == ['val2014/COCO_val2014_000000461245.jpg', 'train2014/COCO_train2014_000000503310.jpg']
    assert found.captions == [['一群长颈鹿。', '一群长颈鹿站在树边'], ['座位空空的。']]
    assert coco_cn(**arguments, split='train').captions == [['飞机正准备起飞。']]
    with pytest.raises(ConfigError, match=r'there is no .*coco-cn_dev.txt; the splits there are train, test'):
        coco_cn(**arguments, split='dev')
    with pytest.raises(ConfigError, match=f'expected imageid.human-written-caption.txt and coco-cn_<split>.txt in '
                                          f'{tmp_path}; {tmp_path} has coco, coco-cn-version1805v1.1'):
        coco_cn(arguments['images'], str(tmp_path))
    split = Path(arguments['annotations'], 'coco-cn_test.txt')
    for ids, message in (('000000461245\n', 'image ids such as COCO_val2014_000000043734, found .000000461245'),
                         ('COCO_val2014_000000000001\n', 'image val2014/COCO_val2014_000000000001.jpg has no caption'),
                         (split.read_text() * 2, 'occurs twice')):
        split.write_text(ids)
        with pytest.raises(ValueError, match=message):
            coco_cn(**arguments)


def test_a_language_of_xm3600(tmp_path: Path) -> None:
    arguments = set_files.xm3600(tmp_path)
    found = xm3600(**arguments)
    assert found.name == 'xm3600_de' and found.image_ids == ['000411001ff7dd4f.jpg', '000ef8db2c7dd84a.jpg']
    assert found.captions == [['Bild 000411001ff7dd4f', 'ein zweites'], ['Bild 000ef8db2c7dd84a', 'ein zweites']]
    assert [len(captions) for captions in xm3600(**arguments, captions_per_image=1).captions] == [1, 1]
    assert xm3600(**{**arguments, 'language': 'no'}).captions[0] == ['bilde 000411001ff7dd4f']
    with pytest.raises(ConfigError, match=f"there is no 'xx'; there are {', '.join(LANGUAGES)}$"):
        xm3600(**{**arguments, 'language': 'xx'})
    # What YAML makes of `language: no`.
    with pytest.raises(ConfigError, match="there is no False; .*; in YAML, 'no' needs quotes"):
        xm3600(**{**arguments, 'language': False})
    with pytest.raises(ConfigError, match=r"captions.jsonl:1 has no 'fr'; it has image/key, image/locale, de, no"):
        xm3600(**{**arguments, 'language': 'fr'})


ROWS = [('a.png', 'red, round'), ('b/c.png', 'blue'), ('a.png', 'a ball')]
OBJECTS = [{'image': image, 'caption': caption} for image, caption in ROWS]
CAPTION_FILES = {
    'captions.csv': 'image,caption\n' + ''.join(f'{image},"{caption}"\n' for image, caption in ROWS),
    'bom.csv': '\ufeffimage,caption\n' + ''.join(f'{image},"{caption}"\n' for image, caption in ROWS),
    'captions.tsv': 'n\tcaption\timage\n' + ''.join(f'1\t{caption}\t{image}\n' for image, caption in ROWS),
    'captions.json': json.dumps(OBJECTS),
    'captions.jsonl': '\n'.join(map(json.dumps, OBJECTS)) + '\n\n',
    'lists.json': json.dumps([{'image': 'a.png', 'caption': ['red, round', 'a ball']}, OBJECTS[1]]),
}


@pytest.mark.parametrize('file', CAPTION_FILES)
def test_a_folder_and_a_captions_file(file: str, tmp_path: Path) -> None:
    arguments = set_files.image_folder(tmp_path)
    (tmp_path / file).write_text(CAPTION_FILES[file])
    found = image_folder(arguments['images'], f'{tmp_path}/{file}')
    assert found.image_ids == ['a.png', 'b/c.png'] and found.captions == [['red, round', 'a ball'], ['blue']]
    # `prepare_data` reads the same files; there an image has as many keys as the one with the most captions.
    splits, dropped = convert.image_folder(arguments['images'], f'{tmp_path}/{file}')
    assert [(s.sample_id, s.captions) for part in splits['train'] for s in part.read(dropped)] == \
        [('a.png', {'0': 'red, round', '1': 'a ball'}), ('b/c.png', {'0': 'blue', '1': ''})]


def test_other_columns_and_images_without_captions(tmp_path: Path) -> None:
    arguments = set_files.image_folder(tmp_path)
    (tmp_path / 'c.csv').write_text('file,text\na.png,red\n')
    assert image_folder(arguments['images'], f'{tmp_path}/c.csv', 'file', 'text').captions == [['red']]
    with pytest.raises(ConfigError, match="c.csv:2 has no 'caption'; it has file, text"):
        image_folder(arguments['images'], f'{tmp_path}/c.csv', 'file')
    (tmp_path / 'c.csv').write_text('image,caption\na.png,red\nb/c.png,\na.png, \n')
    found = image_folder(arguments['images'], f'{tmp_path}/c.csv')
    assert found.image_ids == ['a.png', 'b/c.png'] and found.captions == [['red'], []]


def test_captions_of_a_dataset_that_are_absent_are_no_texts(tmp_path: Path) -> None:
    samples = [Sample(f'{i}', {'de': f'de {i}' if i else '', 'fr': 'fr' if i == 2 else ' ', 'en': 'x'}, picture(i))
               for i in range(3)]
    write_dataset(samples, tmp_path / 'out')
    local = f'{tmp_path}/out/train'
    assert mds(local, caption_keys=['fr', 'de']).captions == [[], ['de 1'], ['fr', 'de 2']]
    assert [sorted(captions) for captions in mds(local).captions] == [['x'], ['de 1', 'x'], ['de 2', 'fr', 'x']]
    # All languages have the same images, whose features are computed once.
    one, other = (mds(local, caption_keys=[key]) for key in ('de', 'fr'))
    assert one.read_image == other.read_image and one.image_ids == other.image_ids == ['0', '1', '2']
    write_dataset([Sample('0', {'de': '', 'en': 'x'}, picture(0))], tmp_path / 'none')
    with pytest.raises(ConfigError, match='no image has a caption in'):
        mds(f'{tmp_path}/none/train', caption_keys=['de'])


def test_an_id_that_two_files_use_names_two_images(tmp_path: Path) -> None:
    parts = [Part(name, lambda _, i=i: [Sample('0', {'x': f'{i}'}, picture(i))]) for i, name in enumerate('ab')]
    write_splits({'train': parts}, Dropped(), tmp_path / 'out')
    found = mds(f'{tmp_path}/out/train')
    assert found.image_ids == ['0', '0 (1)'] and found.captions == [['0'], ['1']]
    assert [found.read_image(i) for i in range(2)] == [picture(0), picture(1)]


def test_an_mds_dataset(tmp_path: Path) -> None:
    arguments = set_files.mds(tmp_path)
    assert len(list(Path(arguments['local']).glob('part-all/shard.*'))) > 1
    found = mds(**arguments)
    assert found.image_ids == [f's{i:04}' for i in range(4)]
    assert found.captions[1] == ['a green square number 1, painted on a plain wall by somebody who likes red',
                                 'a green square']
    assert mds(**arguments, caption_keys=['short']).captions[1] == ['a green square']
    with pytest.raises(ValueError, match="column 'caption.raw' is missing; the dataset has caption.long, "):
        mds(**arguments, caption_keys=['raw'])
    with pytest.raises(FileNotFoundError, match='there is no MDS dataset in'):
        mds(f'{tmp_path}/nowhere')
    shard = sorted(Path(arguments['local']).glob('part-all/shard.*'))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(FileError, match=f'the shard .*{shard.name} is damaged: {len(whole) - 1} bytes, expected'):
        mds(**arguments)
    shard.unlink()
    with pytest.raises(FileError, match=f'the shard .*{shard.name} is missing$'):
        mds(**arguments)
