# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever is wrong with the files or the arguments of an evaluation set: one message that names it.

A case is a set, how its files are changed, its arguments, and what the message says, as a regular expression.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import pytest
from parts import picture
from set_files import WRITERS, chinese_clip, write_images

from llm2clip.config import ConfigError
from llm2clip.registry import build_classification_set, build_retrieval_set

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
    ('flickr30k', put('"1007129816.jpg"', '"/etc/hostname"'), {}, "the path '/etc/hostname' leads to /etc/hostname"),
    ('flickr30k', link_out, {}, "the path '1007129816.jpg' leads to /etc/hostname, expected one inside"),
    ('flickr30k', put('"sentences": [', '"sentences": 5, "x": ['), {}, "image 1: 'sentences' is '5', expected a list"),
    ('flickr30k', put('"1007129816.jpg, caption 0."', '3'), {}, "image 1: 'raw' is '3', expected a text"),
    ('flickr30k', put('1007129816.jpg, caption 0', '\\ud800'), {}, "'raw': has the half character U.D800, expected"),
    ('flickr30k', put('1007129816.jpg, caption 0', '\\u0000'), {}, "'raw': has a NUL character, expected a text"),
    ('flickr30k', put('"images": [', '"images": 3, "x": ['), {}, "images: found '3', expected a list"),
    ('flickr30k', put('"filename": "1007129816.jpg"', '"filename": null'), {}, "'filename' is 'None', expected a text"),
    ('flickr30k', put('caption 0', b'\xe9'), {}, r'dataset_flickr30k\.json: cannot be read .*utf-8.*, expected JSON'),
    ('flickr8k', put_beside('Flickr_8k.testImages.txt', '1001773457_577c3a7d70.jpg\n1.jpg\n'), {},
     r'Flickr_8k\.testImages\.txt:2: image 1\.jpg has no captions in .*Flickr8k\.token\.txt$'),
    ('flickr8k', put_beside('Flickr_8k.testImages.txt', '1003163366_44323f5815.jpg\n'), {},
     r'Flickr_8k\.testImages\.txt:1: image .* is listed already, in .*Flickr_8k\.trainImages\.txt$'),
    ('flickr8k', put_beside('Flickr_8k.testImages.txt', ''), {}, 'flickr8k: there are no images in'),
    ('flickr8k', put_beside('Flickr_8k.testImages.txt', None), {}, "source.split: there is no 'test' in .*train, val$"),
    ('flickr8k', nothing, {'split_files': {'test': 'nowhere.txt'}},
     r'source\.split_files\.test: there is no file /.*/nowhere\.txt$'),
    ('flickr8k', nothing, {'split_files': ['a.txt']}, 'source.split_files: .*, expected dictionary'),
    ('flickr8k', put('#0\tA dog , a "red" ball and 1001 .', '#0'), {},
     r'Flickr8k\.token\.txt:6: expected `<image>#<number>'),
    ('flickr8k', put('#0\tA dog', b'#0\t\xe9'), {}, r'Flickr8k\.token\.txt:1: has the byte 0xe9, expected a text'),
    *(('coco', nothing, {'captions_per_image': value}, 'source.captions_per_image: .*, expected (at least 1|integer)')
      for value in (0, -1, 1.5, True, '5')),
    *(('sharegpt4v', nothing, {'first': value}, 'source.first: .*, expected (at least 1|integer)')
      for value in (0, -1, 1.5, None)),
    ('xm3600', nothing, {'captions_per_image': -2}, 'source.captions_per_image: -2'),
    ('sharegpt4v', put('"conversations": [', '"conversations": 5, "x": ['), {}, "'conversations' is '5', expected"),
    ('sharegpt4v', put('In the photo', b'\xe9'), {}, r'1107\.json: cannot be read .*, expected a JSON list in UTF-8'),
    ('sharegpt4v', put('sam/images/sa_545504.jpg', '../x.jpg'), {}, r"the path '\.\./x\.jpg' leads to"),
    ('xm3600', put('"de": {', '"de": 5, "x": {'), {}, "captions.jsonl:1, de: expected an object with 'caption', found"),
    ('xm3600', put('000411001ff7dd4f"', '../../x"'), {}, r"the path '\.\./\.\./x\.jpg' leads to"),
    ('docci', put('"A view of test_00000."', '5'), {}, r"jsonlines:2: 'description' is '5', expected a text"),
    ('docci', put('A view of test_00000', b'\xe9'), {}, r'jsonlines:2: has the byte 0xe9, expected a text in UTF-8'),
    ('urban1k', urban(b'\xe9'), {}, r'caption/1\.txt: cannot be read .*, expected a text in UTF-8'),
    ('urban1k', urban(b'a\0b\n'), {}, 'image .1.jpg. in .*: has a NUL character'),
    ('image_folder', put('a.png,"red, round"', '../captions.csv,x'), {}, r"captions\.csv: the path .* leads to"),
    ('image_folder', put('"red, round"', '"red'), {}, r'captions\.csv:2: cannot be read .*every quote'),
    ('mds', damage_shard, {}, r'the shard .*\.mds is damaged: xxh64 .*, expected'),
    ('mds', nothing, {'caption_keys': 'short'}, "source.caption_keys: 'short', expected list"),
    ('mds', nothing, {'caption_keys': [1]}, 'source.caption_keys: 1, expected string'),
    ('mds', nothing, {'caption_keys': ['it', 'it']}, 'source.caption_keys: .*expected different values'),
]


@pytest.mark.parametrize(['name', 'change', 'arguments', 'words'], CASES,
                         ids=[f'{i}-{case[0]}' for i, case in enumerate(CASES)])
def test_a_set(name: str, change: Change, arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    change(Path(written.get('annotations') or written.get('captions') or tmp_path), written)
    with pytest.raises(ConfigError, match=f'^retrieval.x.(source: .*)?{words}'):
        build_retrieval_set({'name': name, **written, **arguments}, 'retrieval.x.source')


def test_the_folder_of_images_may_be_a_link(tmp_path: Path) -> None:
    arguments = WRITERS['flickr30k'](tmp_path)
    Path(arguments['images']).rename(tmp_path / 'elsewhere')
    Path(arguments['images']).symlink_to('elsewhere')
    assert build_retrieval_set({'name': 'flickr30k', **arguments}, 'source').read_image(0) == picture(1)


COCO = {'images': [{'id': 1, 'file_name': 'a.jpg'}], 'annotations': [{'image_id': 1, 'caption': 'x'}]}


@pytest.mark.parametrize(['content', 'words'], [
    ({**COCO, 'annotations': {'a': 1}}, 'annotations: found .*, expected a list'),
    ({**COCO, 'images': None}, "images: found 'None', expected a list"),
    ({**COCO, 'annotations': [{'image_id': [1], 'caption': 'x'}]}, r"'image_id' is '\[1\]', expected a number or"),
    ({**COCO, 'annotations': [{'image_id': '1', 'caption': 'x'}]}, 'image a.jpg has no caption'),
    ({**COCO, 'annotations': [{'image_id': 1, 'caption': ['x']}]}, "'caption' is .*, expected a text"),
    ({**COCO, 'images': COCO['images'] * 2}, 'image a.jpg occurs twice'),
])
def test_a_file_in_the_format_of_coco(content: Any, words: str, tmp_path: Path) -> None:
    write_images(tmp_path, ['a.jpg'])
    (tmp_path / 'test.json').write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf'^source: .*{words}'):
        build_retrieval_set({'name': 'coco', 'images': str(tmp_path), 'annotations': f'{tmp_path}/test.json'}, 'source')


@pytest.mark.parametrize(['images', 'words'], [
    (b'\xff\tAAAA\n', r'test_imgs\.tsv: cannot be read .*, expected lines of'),
    (b'1000002 AAAA\n', r'test_imgs\.tsv:1: expected `<id><tab><image in base64>`'),
    (b'1000002\t***\n1000003\tAAAA\n', r'test_imgs\.tsv: image 0 is not base64'),
])
def test_images_in_base64(images: bytes, words: str, tmp_path: Path) -> None:
    arguments = chinese_clip(tmp_path)
    Path(arguments['images']).write_bytes(images)
    with pytest.raises(ValueError, match=words):
        build_retrieval_set({'name': 'flickr_cn', **arguments}, 'source').read_image(0)


@pytest.mark.parametrize(['name', 'content', 'words'], [
    ('n.json', b'["x"', r'n\.json: cannot be read .*, expected JSON'),
    ('n.json', b'["\xe9", "y"]', r'n\.json: cannot be read .*, expected JSON'),
    ('n.json', b'["\\ud800", "y"]', "the name of 'a': has the half character"),
    ('n.json', b'["x", " "]', "the name of 'b' is empty"),
    ('n.txt', b'x\n\xe9\n', r'n\.txt:2: has the byte 0xe9, expected a text in UTF-8'),
])
def test_names_of_classes(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    write_images(tmp_path / 'images', ['a/0.png', 'b/0.png'])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf'^source.*{words}'):
        build_classification_set({'name': 'imagenet_folder', 'images': f'{tmp_path}/images',
                                  'class_names': f'{tmp_path}/{name}'}, 'source')
