# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""ImageNet-style folders, and CLIP_benchmark's layout in tars."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pytest
from parts import picture
from set_files import WDS_CLASSES, write_images, write_wds

from llm2clip.data.classification_sets import clip_benchmark, imagenet_folder
from llm2clip.errors import ConfigError, FileError
from llm2clip.registry import open_set

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
    ('label.txt', 'a\nb\n', r'label.txt has 2 names, but there are 3 class folders'),
    ('names.json', dict(zip(FOLDERS[:1], NAMES)),
     r'names.json has no name for 2 of 3 class folders, such as n01443537'),
    ('map.txt', 'n01440764 tench\nn01443537 goldfish\n', r'map.txt has no name for 1 of 3 class folders'),
    ('bad.json', {'n01440764': 3}, r'bad.json: expected an object from folder to name, a list of names, or an '
                                   r'object of \[folder, name\]'),
    ('empty.json', ['x', ' ', 'z'], "the name of 'n01443537' is empty"),
    ('latin.txt', b'x\n\xe9\nz\n', r'latin\.txt:2: has the byte 0xe9, expected a text in UTF-8'),
])
def test_class_names_that_do_not_fit(file: str, content: object, message: str, images: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else (
        content if isinstance(content, str) else json.dumps(content)).encode())
    with pytest.raises(ValueError, match=message) as error:
        open_set('zeroshot', {'name': 'imagenet_folder', 'images': images, 'class_names': str(path)}, 'source')
    assert getattr(error.value, 'key', 'source.class_names') == 'source.class_names'


@pytest.mark.parametrize(('folders', 'file', 'content'), [
    (['cat', 'dog'], 'names.txt', 'cat animal\ndog animal\n'), (['cat', 'dog'], 'names.txt', 'cat cub\ndog pup\n'),
    (['cat', 'dog'], 'names.json', '["animal", "animal"]'), (['big cat', 'big_cat'], None, '')])
def test_equal_or_ambiguous_class_names(
    folders: list[str], file: Optional[str], content: str, tmp_path: Path
) -> None:
    write_images(tmp_path / 'val', [f'{folder}/0.png' for folder in folders])
    names = file and f'{tmp_path}/{file}'
    if names:
        Path(names).write_text(content)
    with pytest.raises(ConfigError, match=str(tmp_path)) as error:
        imagenet_folder(f'{tmp_path}/val', names)
    assert error.value.key == 'class_names'


def test_a_folder_laid_out_wrongly(images: str, tmp_path: Path) -> None:
    write_images(tmp_path / 'flat', ['ILSVRC2012_val_00000001.JPEG'])
    with pytest.raises(ConfigError, match='flat has no subfolders, expected one per class'):
        imagenet_folder(f'{tmp_path}/flat')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        imagenet_folder(f'{tmp_path}/nowhere')
    Path(images, 'n01440764/Thumbs.db').write_text('')
    with pytest.raises(ConfigError, match=r"n01440764 has \['Thumbs.db'\], expected the images of a class"):
        imagenet_folder(images)
    Path(images, 'n0').mkdir()
    with pytest.raises(ConfigError, match='/n0 has no files, expected the images of a class'):
        imagenet_folder(images)


LABELS = [0, 3, 5, 1, 4]
SEVERAL = [[1, 0, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 1, 0, 1]]


def test_tars_become_a_set(tmp_path: Path) -> None:
    write_wds(tmp_path, LABELS)
    found = clip_benchmark(str(tmp_path))
    order = [0, 2, 4, 1, 3]
    assert found.labels == [LABELS[i] for i in order] and found.classes == WDS_CLASSES and found.name == str(tmp_path)
    assert found.image_ids == [f'{tmp_path}/test/{i % 2}.tar/s{i:07}.png' for i in order]
    assert found.templates == f'{tmp_path}/zeroshot_classification_templates.txt'
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(5)] == [picture(i) for i in order]
    (tmp_path / 'zeroshot_classification_templates.txt').unlink()
    assert clip_benchmark(str(tmp_path)).templates is None
    write_wds(tmp_path / 'several', SEVERAL, tars=1)
    found = clip_benchmark(f'{tmp_path}/several')
    assert found.labels == SEVERAL and [found.read_image(i) for i in range(3)] == [picture(i) for i in range(3)]


def put(name: str, content: Union[str, bytes, None]) -> Callable[[Path], Any]:
    """Write a file, or remove it."""
    def change(folder: Path) -> None:
        path = folder / name
        path.unlink() if content is None else path.write_bytes(
            content.encode() if isinstance(content, str) else content)
    return change


def tar(**files: bytes) -> Callable[[Path], Any]:
    """In place of the second tar, one with these files: `a_png` is `a.png`."""
    def change(folder: Path) -> None:
        with tarfile.open(folder / 'test/1.tar', 'w') as writer:
            for name, content in files.items():
                info = tarfile.TarInfo(name.replace('_', '.'))
                info.size = len(content)
                writer.addfile(info, io.BytesIO(content))
    return change


def npy(values: Any, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype=object if pickled else None), allow_pickle=pickled)
    return buffer.getvalue()


CHANGES: list[tuple[Any, str]] = [
    (put('classnames.txt', None), r'.*/classnames\.txt: cannot be read \(No such file or directory\)'),
    (put('classnames.txt', 'cat\n'), r".*/0\.tar: sample 's0000002': cls: is 5, expected 0 to 0, a line of classn"),
    (put('dataset_type.txt', 'retrieval\n'), r".*/dataset_type\.txt: says 'retrieval', expected classification or"),
    (put('test/nshards.txt', None), r'.*/test/nshards\.txt: cannot be read \(No such file or directory\)'),
    (put('test/nshards.txt', '1'), r'.*/test/nshards\.txt: says 1 tars, and 1\.tar is missing or too many'),
    (put('test/nshards.txt', '4'), r'.*/test/nshards\.txt: says 4 tars, and 2\.tar is missing or too many'),
    (lambda folder: os.truncate(folder / 'test/1.tar', 1600), r'.*/test/1\.tar: cannot be read .*unexpected end.*'),
    (tar(a_png=b'', b_cls=b'0'), r".*/1\.tar: sample 'a': has no cls"),
    (tar(a_png=b'', a_cls=b'-1'), r".*/1\.tar: sample 'a': cls: is -1, expected 0 to 5"),
]
SEVERAL_CHANGES: list[tuple[Any, str]] = [
    (npy([1] * 6, pickled=True), 'cannot be read .*allow_pickle=False'), (npy([1] * 6)[:-1], 'cannot be read'),
    (npy([0, 0, 0, 2, 0, 0]), 'holds int64 of shape'), (npy([[1] * 6]), r'holds int64 of shape \(1, 6\)'),
]


@pytest.mark.parametrize(('change', 'words'), CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_what_is_wrong_is_named(change: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    write_wds(tmp_path, LABELS)
    change(tmp_path)
    with pytest.raises(FileError, match=f'^{words}'):
        open_set('zeroshot', {'name': 'clip_benchmark', 'local': str(tmp_path)}, 'zeroshot.x.source')


@pytest.mark.parametrize(('content', 'words'), SEVERAL_CHANGES, ids=[str(i) for i in range(len(SEVERAL_CHANGES))])
def test_ones_and_zeros_are_one_per_class(content: bytes, words: str, tmp_path: Path) -> None:
    write_wds(tmp_path, SEVERAL)
    tar(a_png=b'', a_npy=content)(tmp_path)
    with pytest.raises(ValueError, match=f"1.tar: sample 'a': npy: {words}.*, expected a 1 or a 0 for each of the 6"):
        clip_benchmark(str(tmp_path))
