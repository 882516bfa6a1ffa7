# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever is wrong with the files or the arguments of an evaluation set: one message that names it.

A case is a set, how its files are changed, its arguments, and what the message says, as a regular expression.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import pytest
from parts import picture
from set_files import WRITERS, write_images

from llm2clip.config import ConfigError
from llm2clip.registry import open_set

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


def damage_shard(file: Path, arguments: dict[str, Any]) -> None:
    path = sorted(Path(arguments['local']).rglob('*.mds'))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def urban(content: bytes) -> Change:
    return lambda file, arguments: Path(arguments['folder'], 'caption/1.txt').write_bytes(content)


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
    ('flickr30k', put('"sentences": [', '"sentences": 5, "x": ['), {}, "image 1: 'sentences' is '5', expected a list"),
    ('flickr30k', put('1007129816.jpg, caption 0', '\\ud800'), {}, "'raw': has the half character U.D800, expected"),
    ('flickr8k', put_beside('Flickr_8k.testImages.txt', '1001773457_577c3a7d70.jpg\n1.jpg\n'), {},
     r'Flickr_8k\.testImages\.txt:2: image 1\.jpg has no captions in .*Flickr8k\.token\.txt$'),
    ('flickr8k', nothing, {'split_files': ['a.txt']}, 'source.split_files: .*, expected dictionary'),
    ('flickr8k', put('#0\tA dog', b'#0\t\xe9'), {}, r'Flickr8k\.token\.txt:1: has the byte 0xe9, expected a text'),
    *(('coco', nothing, {'captions_per_image': value}, 'source.captions_per_image: .*, expected (at least 1|integer)')
      for value in (0, -1, 1.5, True, '5')),
    ('sharegpt4v', put('sam/images/sa_545504.jpg', '../x.jpg'), {}, r"the path '\.\./x\.jpg' leads to"),
    ('xm3600', put('"de": {', '"de": 5, "x": {'), {}, "captions.jsonl:1, de: expected an object with 'caption', found"),
    ('urban1k', urban(b'a\0b\n'), {}, 'image .1.jpg. in .*: has a NUL character'),
    ('image_folder', put('a.png,"red, round"', '../captions.csv,x'), {}, r"captions\.csv: the path .* leads to"),
    ('mds', damage_shard, {}, r'the shard .*\.mds is damaged: xxh64 .*, expected'),
    ('mds', nothing, {'caption_keys': ['it', 'it']}, 'source.caption_keys: .*expected different values'),
]


@pytest.mark.parametrize(['name', 'change', 'arguments', 'words'], CASES,
                         ids=[f'{i}-{case[0]}' for i, case in enumerate(CASES)])
def test_a_set(name: str, change: Change, arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    change(Path(written.get('annotations') or written.get('captions') or tmp_path), written)
    with pytest.raises(ConfigError, match=f'^retrieval.x.(source: .*)?{words}'):
        open_set('retrieval', {'name': name, **written, **arguments}, 'retrieval.x.source')


def test_the_folder_of_images_may_be_a_link(tmp_path: Path) -> None:
    arguments = WRITERS['flickr30k'](tmp_path)
    Path(arguments['images']).rename(tmp_path / 'elsewhere')
    Path(arguments['images']).symlink_to('elsewhere')
    assert open_set('retrieval', {'name': 'flickr30k', **arguments}, 'source').read_image(0) == picture(1)


@pytest.mark.parametrize(['name', 'content', 'words'], [
    ('n.json', b'["\\ud800", "y"]', "the name of 'a': has the half character"),
    ('n.json', b'["x", " "]', "the name of 'b' is empty"),
    ('n.txt', b'x\n\xe9\n', r'n\.txt:2: has the byte 0xe9, expected a text in UTF-8'),
])
def test_names_of_classes(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    write_images(tmp_path / 'images', ['a/0.png', 'b/0.png'])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf'^source.*{words}'):
        open_set('zeroshot', {'name': 'imagenet_folder', 'images': f'{tmp_path}/images',
                                  'class_names': f'{tmp_path}/{name}'}, 'source')
