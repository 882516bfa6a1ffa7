# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A user's own sets: a folder with a captions file, and an MDS dataset."""

import json
from pathlib import Path

import pytest
from parts import picture, write_dataset
from set_files import image_folder as write_image_folder
from set_files import mds as write_mds
from streaming import MDSWriter

from llm2clip.config import ConfigError
from llm2clip.data.convert import image_folder as convert
from llm2clip.data.convert.samples import Sample
from llm2clip.evaluation.sets.generic import image_folder, mds
from llm2clip.files import FileError

ROWS = [('a.png', 'red, round'), ('b/c.png', 'blue'), ('a.png', 'a ball')]
OBJECTS = [{'image': image, 'caption': caption} for image, caption in ROWS]
FILES = {
    'captions.csv': 'image,caption\n' + ''.join(f'{image},"{caption}"\n' for image, caption in ROWS),
    'bom.csv': '\ufeffimage,caption\n' + ''.join(f'{image},"{caption}"\n' for image, caption in ROWS),
    'captions.tsv': 'n\tcaption\timage\n' + ''.join(f'1\t{caption}\t{image}\n' for image, caption in ROWS),
    'captions.json': json.dumps(OBJECTS),
    'captions.jsonl': '\n'.join(map(json.dumps, OBJECTS)) + '\n\n',
    'lists.json': json.dumps([{'image': 'a.png', 'caption': ['red, round', 'a ball']}, OBJECTS[1]]),
}


@pytest.mark.parametrize('file', FILES)
def test_a_folder_and_a_captions_file(file: str, tmp_path: Path) -> None:
    arguments = write_image_folder(tmp_path)
    (tmp_path / file).write_text(FILES[file])
    found = image_folder(arguments['images'], f'{tmp_path}/{file}')
    assert found.image_ids == ['a.png', 'b/c.png'] and found.captions == [['red, round', 'a ball'], ['blue']]
    # `prepare_data` reads the same files; there an image has as many keys as the one with the most captions.
    splits, dropped = convert.image_folder(arguments['images'], f'{tmp_path}/{file}')
    assert [(s.sample_id, s.captions) for part in splits['train'] for s in part.read(dropped)] == \
        [('a.png', {'0': 'red, round', '1': 'a ball'}), ('b/c.png', {'0': 'blue', '1': ''})]


def test_other_columns(tmp_path: Path) -> None:
    arguments = write_image_folder(tmp_path)
    (tmp_path / 'c.csv').write_text('file,text\na.png,red\n')
    assert image_folder(arguments['images'], f'{tmp_path}/c.csv', 'file', 'text').captions == [['red']]
    with pytest.raises(ConfigError, match="c.csv:2 has no 'caption'; it has file, text"):
        image_folder(arguments['images'], f'{tmp_path}/c.csv', 'file')


@pytest.mark.parametrize(['file', 'text', 'message'], [
    ('c.csv', 'image,caption\na.png,red, round\n', r'c.csv:2: has 3 values, expected 2, one per column of image, '
                                                  'caption; a text with commas needs quotes'),
    ('d.csv', 'image,caption\na.png\n', r'd.csv:2: has 1 values, expected 2'),
    ('i.csv', 'image,caption\na.png,\n', r'i.csv has no captions'),
    ('j.csv', 'image,caption\n', r'j.csv has no rows'),
])
def test_captions_that_cannot_be_read(file: str, text: str, message: str, tmp_path: Path) -> None:
    arguments = write_image_folder(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        image_folder(arguments['images'], f'{tmp_path}/{file}')


def test_images_may_have_no_caption_in_a_captions_file(tmp_path: Path) -> None:
    arguments = write_image_folder(tmp_path)
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


def test_an_mds_dataset(tmp_path: Path) -> None:
    arguments = write_mds(tmp_path)
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


def test_shards_are_checked_when_the_set_is_opened(tmp_path: Path) -> None:
    arguments = write_mds(tmp_path)
    shard = sorted(Path(arguments['local']).glob('part-all/shard.*'))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(FileError, match=f'the shard .*{shard.name} is damaged: {len(whole) - 1} bytes, expected'):
        mds(**arguments)
    shard.unlink()
    with pytest.raises(FileError, match=f'the shard .*{shard.name} is missing$'):
        mds(**arguments)


def test_a_dataset_that_would_run_code_or_is_compressed_is_refused(tmp_path: Path) -> None:
    columns = {'sample_id': 'str', 'image': 'bytes', 'caption.a': 'str'}
    sample = {'sample_id': 's', 'image': b'x', 'caption.a': 'text'}
    with MDSWriter(out=str(tmp_path / 'code'), columns={**columns, 'more': 'pkl'}) as writer:
        writer.write({**sample, 'more': 1})
    with pytest.raises(FileError, match='index.json: shard 0: column more contains an unsafe type: pkl'):
        mds(f'{tmp_path}/code')
    with MDSWriter(out=str(tmp_path / 'zip'), columns=columns, compression='zstd') as writer:
        writer.write(sample)
    with pytest.raises(FileError, match='shard 0: is compressed'):
        mds(f'{tmp_path}/zip')
