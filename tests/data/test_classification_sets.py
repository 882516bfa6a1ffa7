# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""ImageNet-style folders, and CLIP_benchmark's layout in tars."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pytest
from parts import picture
from refusals import refused_at
from set_files import WDS_CLASSES, write_images, write_wds

from llm2clip.data.classification_sets import clip_benchmark, imagenet_folder
from llm2clip.errors import FileError
from llm2clip.registry import open_set

FOLDERS = ['n01440764', 'n01443537', 'n01484850']
NAMES = ['tench', 'goldfish', 'great white shark']
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
    ('list.json', ['tench', 'goldfish', 'great_white_shark']),
    ('label.txt', '\n'.join(NAMES) + '\n'),
])
def test_class_names(file: str, content: object, images: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert imagenet_folder(images, str(path)).classes == NAMES


@pytest.mark.parametrize(['file', 'content'], [
    ('label.txt', 'a\nb\n'), ('names.json', json.dumps(dict(zip(FOLDERS[:1], NAMES)))), ('list.json', '[1, 2, 3]'),
    ('latin.txt', b'x\n\xe9\nz\n')])
def test_class_names_that_do_not_fit_name_their_file(
    file: str, content: Union[str, bytes], images: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FileError) as error:
        open_set('zeroshot', {'name': 'imagenet_folder', 'images': images, 'class_names': str(path)}, 'source')
    assert error.value.path.split(':')[0] == str(path)


@pytest.mark.parametrize(('folders', 'file', 'content'), [
    (['cat', 'dog'], 'names.txt', 'cat animal\ndog animal\n'), (['cat', 'dog'], 'names.txt', 'cat cub\ndog pup\n'),
    (FOLDERS, 'LOC_synset_mapping.txt', ''.join(f'{folder} {name}\n' for folder, name in zip(FOLDERS, NAMES))),
    (['cat', 'dog'], 'names.json', '["animal", "animal"]'), (['big cat', 'big_cat'], None, '')])
def test_equal_or_ambiguous_class_names_are_refused(
    folders: list[str], file: Optional[str], content: str, tmp_path: Path
) -> None:
    write_images(tmp_path / 'val', [f'{folder}/0.png' for folder in folders])
    names = file and f'{tmp_path}/{file}'
    if names:
        Path(names).write_text(content)
    with refused_at('class_names', str(tmp_path)):
        imagenet_folder(f'{tmp_path}/val', names)


def test_a_folder_laid_out_wrongly_is_named(images: str, tmp_path: Path) -> None:
    write_images(tmp_path / 'flat', ['ILSVRC2012_val_00000001.JPEG'])
    write_images(tmp_path / 'empty', ['cat/0.png'])
    (tmp_path / 'empty/dog').mkdir()
    for name, message in (('nowhere', 'no subfolders'), ('flat', 'no subfolders'), ('empty', 'dog has no files')):
        with refused_at('images', message):
            imagenet_folder(f'{tmp_path}/{name}')


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


@pytest.mark.parametrize(('file', 'content', 'place'), [
    ('classnames.txt', None, 'classnames.txt'), ('classnames.txt', 'cat\n', "test/0.tar: sample 's0000002'"),
    ('dataset_type.txt', 'retrieval\n', 'dataset_type.txt'), ('test/nshards.txt', None, 'test/nshards.txt'),
    ('test/nshards.txt', 'x', 'test/nshards.txt'), ('test/nshards.txt', '4', 'test/2.tar')])
def test_a_file_that_is_missing_or_wrong_is_named(
    file: str, content: Optional[str], place: str, tmp_path: Path
) -> None:
    write_wds(tmp_path, LABELS)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content)
    with refused_at(f'{tmp_path}/{place}'):
        open_set('zeroshot', {'name': 'clip_benchmark', 'local': str(tmp_path)}, 'zeroshot.x.source')


def _npy(values: Any, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype=object if pickled else None), allow_pickle=pickled)
    return buffer.getvalue()


@pytest.mark.parametrize(('labels', 'files', 'words'), [
    (LABELS, {'a.cls': b'0'}, ''), (LABELS, {'a.png': b'', 'b.cls': b'0'}, "'cls'"),
    (LABELS, {'a.png': b'', 'a.cls': b'-1'}, '-1 is not'), (LABELS, {'a.png': b'', 'a.cls': b'6'}, '6 is not'),
    (SEVERAL, {'a.png': b'', 'a.npy': _npy([1] * 6, pickled=True)}, 'allow_pickle=False'),
    (SEVERAL, {'a.png': b'', 'a.npy': _npy([1] * 6)[:-1]}, ''),
    (SEVERAL, {'a.png': b'', 'a.npy': _npy([0, 0, 0, 2, 0, 0])}, 'a 1 or a 0 per line'),
    (SEVERAL, {'a.png': b'', 'a.npy': _npy([[1] * 6])}, r'shape \(1, 6\)')])
def test_a_sample_without_image_or_valid_classes_is_named(
    labels: Any, files: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    write_wds(tmp_path, labels)
    with tarfile.open(tmp_path / 'test/1.tar', 'w') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with refused_at(f"{tmp_path}/test/1.tar: sample 'a'", words):
        clip_benchmark(str(tmp_path))
