# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""ImageNet-style folders."""

import json
import pickle
from pathlib import Path

import pytest
from parts import picture
from set_files import write_images

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets.classification import imagenet_folder

FOLDERS = ['n01440764', 'n01443537', 'n01484850']
NAMES = ['tench', 'goldfish', 'great white shark']
KERAS = ['tench', 'goldfish', 'great_white_shark']
FILES = [f'{FOLDERS[label]}/ILSVRC2012_val_{number:08}.JPEG' for label, number in ((0, 293), (1, 9), (1, 236), (2, 7))]


@pytest.fixture
def images(tmp_path: Path) -> str:
    write_images(tmp_path / 'val', FILES)
    (tmp_path / 'val/n01440764/.hidden').write_text('')
    (tmp_path / 'val/readme.txt').write_text('')
    return f'{tmp_path}/val'


def test_a_subfolder_is_a_class(images: str) -> None:
    found = imagenet_folder(images)
    assert found.image_ids == FILES and found.labels == [0, 1, 1, 2] and found.classes == FOLDERS
    assert found.name == images
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(4)] == [picture(i) for i in range(4)]


@pytest.mark.parametrize(['file', 'content'], [
    ('names.json', dict(zip(reversed(FOLDERS), reversed(NAMES)))),
    ('list.json', NAMES),
    ('imagenet_class_index.json', {str(i): list(pair) for i, pair in enumerate(zip(FOLDERS, KERAS))}),
    ('label.txt', '\n'.join(NAMES) + '\n'),
    ('LOC_synset_mapping.txt', ''.join(f'{f} {n}\n' for f, n in [*zip(FOLDERS, NAMES), ('n09999999', 'not here')])),
])
def test_class_names(file: str, content: object, images: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert imagenet_folder(images, str(path)).classes == NAMES


@pytest.mark.parametrize(['file', 'content', 'message'], [
    ('label.txt', 'a\nb\n', r'label.txt has 2 names, but .*/val has 3 class folders'),
    ('names.json', dict(zip(FOLDERS[:1], NAMES)),
     r'names.json has no name for 2 of 3 class folders in .*/val, the first of them is n01443537; it has names for '
     r'n01440764'),
    ('map.txt', 'n01440764 tench\nn01443537 goldfish\n', r'map.txt has no name for 1 of 3 class folders'),
    ('bad.json', {'n01440764': 3}, r'bad.json: expected an object from folder to name, a list of names, or an '
                                   r'object of \[folder, name\]'),
])
def test_class_names_that_do_not_fit(file: str, content: object, message: str, images: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=f'source.class_names: .*{message}'):
        imagenet_folder(images, str(path))
    with pytest.raises(ConfigError, match='source.class_names: there is no file nowhere.txt'):
        imagenet_folder(images, 'nowhere.txt')


def test_a_folder_laid_out_wrongly(images: str, tmp_path: Path) -> None:
    write_images(tmp_path / 'flat', ['ILSVRC2012_val_00000001.JPEG'])
    with pytest.raises(ConfigError, match=r'one subfolder per class; .*/flat has ILSVRC2012_val_00000001.JPEG'):
        imagenet_folder(f'{tmp_path}/flat')
    with pytest.raises(ConfigError, match=f'source.images: there is no folder .*/nowhere; {tmp_path} has flat, val'):
        imagenet_folder(f'{tmp_path}/nowhere')
    Path(images, 'n01440764/Thumbs.db').write_text('')
    with pytest.raises(ConfigError, match='expected only images in the class folder .*n01440764, found Thumbs.db'):
        imagenet_folder(images)
    Path(images, 'n0').mkdir()
    with pytest.raises(ConfigError, match='the class folder .*/n0 has no images'):
        imagenet_folder(images)
