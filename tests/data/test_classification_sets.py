# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""ImageNet-style folders, and CLIP_benchmark's layout in tars."""

import io
import json
import pickle
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pytest
from parts import picture
from refusals import refused_at
from set_files import WDS_CLASSES, tar, write_images, write_wds

from llm2clip.data.classification_sets import clip_benchmark, imagenet_folder
from llm2clip.registry import open_set

pytestmark = pytest.mark.usefixtures('here')
FOLDERS = ['n01440764', 'n01443537', 'n01484850']
CATS = ['cat', 'dog']
NAMES = ['tench', 'goldfish', 'great white shark']
FILES = [f'{FOLDERS[label]}/ILSVRC2012_val_{number:08}.JPEG' for label, number in ((0, 293), (1, 9), (1, 236), (2, 7))]


@pytest.fixture
def images(here: None) -> str:
    write_images(Path('val'), FILES)
    Path('val/n01440764/.hidden').touch()
    Path('val/readme.txt').touch()
    return 'val'


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
def test_class_names(file: str, content: object, images: str) -> None:
    Path(file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert imagenet_folder(images, file).classes == NAMES


@pytest.mark.parametrize(('folders', 'file', 'content', 'place'), [
    (FOLDERS, 'label.txt', 'a\nb\n', 'label.txt'), (FOLDERS, 'list.json', '[1, 2, 3]', 'list.json'),
    (FOLDERS, 'names.json', json.dumps(dict(zip(FOLDERS[:1], NAMES))), 'names.json'),
    (FOLDERS, 'latin.txt', b'x\n\xe9\nz\n', 'latin.txt:2'),
    (FOLDERS, 'LOC_synset_mapping.txt', ''.join(f'{folder} {name}\n' for folder, name in zip(FOLDERS, NAMES)), None),
    (CATS, 'names.txt', 'cat animal\ndog animal\n', None), (CATS, 'names.txt', 'cat cub\ndog pup\n', None),
    (CATS, 'names.json', '["animal", "animal"]', None), (['big cat', 'big_cat'], None, '', None)])
def test_class_names_that_do_not_fit_or_are_ambiguous_are_refused(
    folders: list[str], file: Optional[str], content: Union[str, bytes], place: Optional[str]
) -> None:
    """With the place in their file, or else the argument and the file or folder."""
    write_images(Path('val'), [f'{folder}/0.png' for folder in folders])
    if file:
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    with refused_at(place or 'source.class_names', file or 'val'):
        open_set('zeroshot', {'name': 'imagenet_folder', 'images': 'val', 'class_names': file}, 'source')


def test_a_folder_laid_out_wrongly_is_named() -> None:
    write_images(Path('flat'), ['ILSVRC2012_val_00000001.JPEG'])
    write_images(Path('empty'), ['cat/0.png'])
    Path('empty/dog').mkdir()
    for name, message in (('nowhere', 'no subfolders'), ('flat', 'no subfolders'), ('empty', 'dog has no files')):
        with refused_at('images', message):
            imagenet_folder(name)


LABELS = [0, 3, 5, 1, 4]
SEVERAL = [[1, 0, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 1, 0, 1]]


def test_tars_become_a_set() -> None:
    write_wds(Path('set'), LABELS)
    found = clip_benchmark('set')
    order = [0, 2, 4, 1, 3]
    assert found.labels == [LABELS[i] for i in order] and found.classes == WDS_CLASSES and found.name == 'set'
    assert found.image_ids == [f'set/test/{i % 2}.tar/s{i:07}.png' for i in order]
    assert found.templates == 'set/zeroshot_classification_templates.txt'
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(5)] == [picture(i) for i in order]
    Path(found.templates).unlink()
    assert clip_benchmark('set').templates is None
    write_wds(Path('several'), SEVERAL, tars=1)
    found = clip_benchmark('several')
    assert found.labels == SEVERAL and [found.read_image(i) for i in range(3)] == [picture(i) for i in range(3)]


@pytest.mark.parametrize(('file', 'content', 'place'), [
    ('classnames.txt', None, 'classnames.txt'), ('classnames.txt', 'cat\n', "test/0.tar: sample 's0000002'"),
    ('dataset_type.txt', 'retrieval\n', 'dataset_type.txt'), ('test/nshards.txt', None, 'test/nshards.txt'),
    ('test/nshards.txt', 'x', 'test/nshards.txt'), ('test/nshards.txt', '4', 'test/2.tar')])
def test_a_file_that_is_missing_or_wrong_is_named(file: str, content: Optional[str], place: str) -> None:
    write_wds(Path('set'), LABELS)
    Path('set', file).unlink(missing_ok=True)
    if content is not None:
        Path('set', file).write_text(content)
    with refused_at(f'set/{place}'):
        open_set('zeroshot', {'name': 'clip_benchmark', 'local': 'set'}, 'zeroshot.x.source')


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
def test_a_sample_without_image_or_valid_classes_is_named(labels: Any, files: dict[str, bytes], words: str) -> None:
    write_wds(Path('set'), labels)
    Path('set/test/1.tar').write_bytes(tar(*files.items()))
    with refused_at("set/test/1.tar: sample 'a'", words):
        clip_benchmark('set')
