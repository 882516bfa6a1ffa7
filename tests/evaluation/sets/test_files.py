# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What holds for every retrieval set, and what is said when files or arguments are not as they should be."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import pytest
from parts import picture
from set_files import WRITERS

from llm2clip.errors import ConfigError
from llm2clip.registry import RETRIEVAL_SETS, find, open_set

# Each set's images, as their numbers when they were written.
EXPECTED = {
    'coco': [0, 3], 'coco_cn': [1, 0], 'docci': [1, 3], 'flickr30k': [1, 3], 'flickr8k': [1, 4],
    'flickr_cn': [0, 1], 'image_folder': [0, 1], 'mds': [0, 1, 2, 3], 'sharegpt4v': [0, 1, 2], 'urban1k': [0, 1, 2],
    'xm3600': [0, 1],
}
IN_FILES = sorted(EXPECTED.keys() - {'mds'})


@pytest.mark.parametrize('name', sorted(RETRIEVAL_SETS))
def test_images_are_read_by_position_also_in_another_process(name: str, tmp_path: Path) -> None:
    arguments = WRITERS[name](tmp_path)
    if 'images' in arguments:  # which may be a link
        Path(arguments['images']).rename(tmp_path / 'elsewhere')
        Path(arguments['images']).symlink_to('elsewhere')
    found = find(RETRIEVAL_SETS[name])(**arguments)
    assert len(found.image_ids) == len(set(found.image_ids)) == len(found.captions) == len(EXPECTED[name])
    assert all(captions and all(captions) for captions in found.captions)
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(len(found.image_ids))] == [picture(i) for i in EXPECTED[name]]


@pytest.mark.parametrize('name', IN_FILES)
def test_what_is_missing_is_found_when_the_set_is_opened(name: str, tmp_path: Path) -> None:
    arguments = WRITERS[name](tmp_path)
    found = find(RETRIEVAL_SETS[name])(**arguments)
    folder = Path(arguments.get('images') or f'{tmp_path}/Urban1k/image')
    path = folder / found.image_ids[-1]
    path.unlink()
    total = len(found.image_ids)
    message = fr'1 of {total} images are missing, the first of them is {path}; .* (has |is empty)'
    if name == 'urban1k':
        message = r'1 of 3 files in .*/caption have none of the same name in .*/image, the first of them is 10'
    with pytest.raises(ConfigError, match=f'({name}|photos).*: {message}'):
        find(RETRIEVAL_SETS[name])(**arguments)
    for key in arguments.keys() & {'images', 'annotations', 'folder'}:
        with pytest.raises(ConfigError, match=f'source.{key}: .*{tmp_path}/nowhere/at/all.*; {tmp_path} has '):
            find(RETRIEVAL_SETS[name])(**{**arguments, key: f'{tmp_path}/nowhere/at/all'})


@pytest.mark.parametrize('name', sorted(RETRIEVAL_SETS.keys() - {'mds', 'urban1k', 'sharegpt4v'}))
def test_an_empty_file_is_not_a_set(name: str, tmp_path: Path) -> None:
    arguments = WRITERS[name](tmp_path)
    path = Path(arguments.get('annotations') or arguments['captions'])
    path = path / 'coco-cn_test.txt' if path.is_dir() else path
    path.write_text('{"images": []}' if path.suffix == '.json' else '')
    with pytest.raises(ConfigError, match=f'(no images|no rows).*{path.name}|{path.name}.*(no images|no rows)'):
        find(RETRIEVAL_SETS[name])(**arguments)


# A set, how its files are changed, its arguments, and what the message says, as a regular expression.
Change = Callable[[Path, dict[str, Any]], Any]


def nothing(file: Path, arguments: dict[str, Any]) -> None:
    """Leave the files as they are."""


def put(old: Union[str, bytes], new: Union[str, bytes]) -> Change:
    """Replace a part of the annotations."""
    def change(file: Path, arguments: dict[str, Any]) -> None:
        before, after = (text.encode() if isinstance(text, str) else text for text in (old, new))
        content = file.read_bytes()
        assert before in content
        file.write_bytes(content.replace(before, after))
    return change


def link_out(file: Path, arguments: dict[str, Any]) -> None:
    image = next(path for path in sorted(Path(arguments['images']).rglob('*')) if path.name == '1007129816.jpg')
    image.unlink()
    image.symlink_to('/etc/hostname')


def put_beside(name: str, content: Union[str, None]) -> Change:
    """Write another file into the folder of the annotations, or remove it."""
    def change(file: Path, arguments: dict[str, Any]) -> None:
        path = file.with_name(name)
        path.unlink() if content is None else path.write_text(content)
    return change


CASES: list[tuple[str, Change, dict[str, Any], str]] = [
    ('flickr30k', put('1007129816.jpg', '../dataset_flickr30k.json'), {},
     r'dataset_flickr30k\.json: the path .* leads to .*, expected one inside .*/flickr30k-images'),
    ('flickr30k', link_out, {}, "the path '1007129816.jpg' leads to /etc/hostname, expected one inside"),
    ('docci', put('A view of test_00000.', ' '), {}, 'docci: image test_00000.jpg has an empty caption in .*lines'),
    ('flickr8k', put_beside('Flickr_8k.testImages.txt', '1001773457_577c3a7d70.jpg\n1.jpg\n'), {},
     r'Flickr_8k\.testImages\.txt:2: image 1\.jpg has no captions in .*Flickr8k\.token\.txt$'),
    ('flickr8k', put('#0\tA dog', b'#0\t\xe9'), {}, r'Flickr8k\.token\.txt:1: has the byte 0xe9, expected a text'),
    ('sharegpt4v', put('sam/images/sa_545504.jpg', '../x.jpg'), {}, r"the path '\.\./x\.jpg' leads to"),
    ('image_folder', put('a.png,"red, round"', '../captions.csv,x'), {}, r"captions\.csv: the path .* leads to"),
    ('image_folder', put('a.png,a ball', '../photos/a.png,a ball'), {}, r"captions\.csv: 'a.png' and '../ph"),
]


@pytest.mark.parametrize(['name', 'change', 'arguments', 'words'], CASES,
                         ids=[f'{i}-{case[0]}' for i, case in enumerate(CASES)])
def test_a_set(name: str, change: Change, arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    change(Path(written.get('annotations') or written.get('captions') or tmp_path), written)
    with pytest.raises(ConfigError, match=f'^retrieval.x.(source: .*)?{words}'):
        open_set('retrieval', {'name': name, **written, **arguments}, 'retrieval.x.source')
