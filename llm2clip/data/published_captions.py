# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The files in which the captions of Flickr8k, Flickr30k and COCO are published, each form with its one reader."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.data.caption_files import field, list_field, numbered, read_csv, read_lines, text_field, texts_field
from llm2clip.files import FileError, parse_json, read_json, reading

__all__ = ['Images', 'captions_of_lines', 'official_lists', 'read_splits']

Images = Iterable[tuple[str, list[str]]]
"""Each image's path in its folder, and its captions."""

# Flickr8k's own lists; Karpathy and Fei-Fei call its `dev` images `val`.
_LISTS = {'train': 'Flickr_8k.trainImages.txt', 'val': 'Flickr_8k.devImages.txt', 'test': 'Flickr_8k.testImages.txt'}
# `1000092795.jpg#0<tab>A caption`, `1009692167#zhm#1 <caption>`, `6228559981<tab><caption>`
_NUMBERED = re.compile(r'(?P<image>[^#\s,]+)(?:#\S*)?\s+(?P<caption>.+)')
# `1007129816.jpg,A caption`
_COMMA = re.compile(r'(?P<image>[^\s,]+\.jpg),(?P<caption>.*)')
# `一条:q 狗:n 。:wj`: every word with its part of speech
_SEGMENTED = re.compile(r'\S+:[a-z]+[0-9]*(?:\s+\S+:[a-z]+[0-9]*)*')


def read_splits(path: str, split_files: Optional[Mapping[str, str]] = None) -> dict[Optional[str], Images]:
    """Split -> its images with their captions, which are read when they are asked for, once.

    Images that are in no split are under None; so are all images of a file that has no splits.

    Args:
        path: One of

            - JSON of Karpathy and Fei-Fei, which has splits (``dataset_flickr8k.json``),
            - CSV of nlphuji/flickr30k, which has splits (``flickr_annotations_30k.csv``),
            - JSON in COCO's own format (``captions_train2017.json``),
            - a JSON list of ``{image, caption}``, as ALBEF and BLIP use it, with one caption or a list of them,
            - under any other name, the lines that `captions_of_lines` reads (``Flickr8k.token.txt``, ``captions.txt``).
        split_files: For a file without splits: split -> file with one image per line.

    Raises:
        ConfigError: A field or a list of `split_files` is missing, or the file that they are for has splits of its own
            or no images.
        FileError: A file cannot be read, or a list names an image without captions or one that is listed already.  What
            is wrong with a caption is said when it is read.
    """
    splits: dict[Optional[str], Images]
    if path.endswith('.csv'):
        splits = _by_split(read_csv(path), _of_csv)
    elif path.endswith('.json'):
        splits = _of_json(read_json(path), path)
    else:
        splits = {None: _of_lines(path)}
    if not split_files:
        return splits
    if None not in splits:
        raise ConfigError(f'source.split_files: {path} has splits of its own, expected a file without splits')
    return _of_lists(dict(splits[None]), path, split_files)


def official_lists(path: str) -> dict[str, str]:
    """The lists of Flickr8k's splits that lie beside its ``.token.txt`` file; beside another file, none."""
    files = {split: str(Path(path).with_name(name)) for split, name in _LISTS.items()}
    return {split: file for split, file in files.items() if path.endswith('.token.txt') and Path(file).is_file()}


def _of_json(content: Any, path: str) -> dict[Optional[str], Images]:
    if isinstance(content, list):
        return {None: _of_list(content, path)}
    if isinstance(content, dict) and 'annotations' in content:
        return {None: _of_coco(content, path)}
    return _by_split(numbered(field(content, 'images', path), f'{path}, image'), _of_karpathy)


def _by_split(
    records: Iterable[tuple[str, Any]], read: Callable[[str, Any], tuple[str, list[str]]]
) -> dict[Optional[str], Images]:
    found: dict[Optional[str], list[tuple[str, Any]]] = {}
    for where, record in records:
        found.setdefault(text_field(record, 'split', where), []).append((where, record))
    return {split: starmap(read, rows) for split, rows in found.items()}


def _of_karpathy(where: str, image: Any) -> tuple[str, list[str]]:
    folder = f'{text_field(image, "filepath", where)}/' if 'filepath' in image else ''
    return (folder + text_field(image, 'filename', where),
            [text_field(sentence, 'raw', where) for sentence in list_field(image, 'sentences', where)])


def _of_csv(where: str, row: Mapping[str, str]) -> tuple[str, list[str]]:
    """The captions of an image are a JSON list in one cell."""
    file = text_field(row, 'filename', where)
    captions = parse_json(text_field(row, 'raw', where), f'{where}, {file}: \'raw\'')
    return file, texts_field({'raw': captions}, 'raw', f'{where}, {file}')


def _of_list(content: list[Any], path: str) -> Images:
    """For training there is one record per caption, for evaluation one per image."""
    captions: dict[str, list[str]] = {}
    for where, record in numbered(content, f'{path}, image'):
        image = text_field(record, 'image', where)
        if isinstance(field(record, 'caption', where), str):
            captions.setdefault(image, []).append(text_field(record, 'caption', where))
        elif image in captions:
            raise FileError(f'{where}: image {image} occurs twice, expected one list of captions per image')
        else:
            captions[image] = texts_field(record, 'caption', where)
    yield from captions.items()


def _of_coco(content: dict[str, Any], path: str) -> Images:
    captions: dict[Any, list[str]] = {}
    for where, annotation in numbered(content['annotations'], f'{path}, annotation'):
        captions.setdefault(_id(annotation, 'image_id', where), []).append(text_field(annotation, 'caption', where))
    for where, image in numbered(field(content, 'images', path), f'{path}, image'):
        yield text_field(image, 'file_name', where), captions.get(_id(image, 'id', where), [])


def _id(record: Any, key: str, where: str) -> Any:
    value = field(record, key, where)
    if not isinstance(value, (int, str)):
        raise FileError(f'{where}: {key!r} is {str(value)[:60]!r}, expected a number or a text')
    return value


def _of_lines(path: str) -> Iterator[tuple[str, list[str]]]:
    yield from captions_of_lines(path).items()


def _of_lists(
    captions: dict[str, list[str]], path: str, split_files: Mapping[str, str]
) -> dict[Optional[str], Images]:
    if not captions:
        raise ConfigError(f'{path} has no images')
    splits: dict[Optional[str], list[tuple[str, list[str]]]] = {}
    split_of: dict[str, str] = {}
    for split, file in split_files.items():
        if not Path(file).is_file():
            raise ConfigError(f'source.split_files.{split}: there is no file {Path(file).absolute()}')
        splits[split] = []
        for where, image in read_lines(file):
            if image in split_of:
                raise FileError(f'{where}: image {image} is listed already, in {split_files[split_of[image]]}')
            if image not in captions:
                raise FileError(f'{where}: image {image[:60]} has no captions in {path}')
            split_of[image] = split
            splits[split].append((image, captions[image]))
    return {**splits, None: [(image, lines) for image, lines in captions.items() if image not in split_of]}


def captions_of_lines(path: str) -> dict[str, list[str]]:
    """Image file -> captions.

    Lines are ``<image>#<number><tab or space><caption>``, where the number may be missing and the image may lack
    ``.jpg``; or, mostly under a header, ``<image>.jpg,<caption>``.  Of the latter, Kaggle's files quote captions with
    commas as CSV does, and CLIP_benchmark's quote nothing.  Chinese that is split into words with their parts of
    speech is put together again.

    Raises:
        FileError: A line has neither form, or a quote is not closed; the message names file and line.
    """
    captions: dict[str, list[str]] = {}
    lines = list(read_lines(path))
    form = _COMMA if any(_COMMA.fullmatch(line) for _, line in lines[1:2]) else _NUMBERED
    if form is _COMMA and not _COMMA.fullmatch(lines[0][1]):
        lines = lines[1:]
    found = [(where, _parts(form, line, where)) for where, line in lines]
    quoted = form is _COMMA and not any(',' in caption and caption[0] != '"' for _, (_, caption) in found)
    for where, (image, caption) in found:
        image = image if '.' in image else f'{image}.jpg'
        if quoted:
            caption = _unquoted(caption, where)
        elif _SEGMENTED.fullmatch(caption):
            caption = ''.join(word.rsplit(':', 1)[0] for word in caption.split())
        captions.setdefault(image, []).append(caption)
    return captions


def _parts(form: re.Pattern[str], line: str, where: str) -> tuple[str, str]:
    match = form.fullmatch(line)
    if match is None:
        raise FileError(f'{where}: expected `<image>#<number><tab><caption>` or `<image>.jpg,<caption>`, found '
                        f'{line[:60]!r}')
    return match['image'], match['caption']


def _unquoted(caption: str, where: str) -> str:
    """The one value of a row of CSV."""
    with reading(where, 'a row in which every quote that is opened is closed, and one in a text is doubled'):
        values = next(csv.reader([caption], strict=True), [''])
    if len(values) > 1:
        raise FileError(f'{where}: has {len(values) + 1} values, expected an image and a caption; a text with '
                        'commas needs quotes')
    return values[0]
