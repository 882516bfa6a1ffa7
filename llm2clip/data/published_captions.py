# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The files in which the captions of Flickr8k, Flickr30k and COCO are published, each form with its one reader."""

import csv
import re
from collections.abc import Iterable, Mapping
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
        ConfigError: A field or a list of `split_files` is missing, or the file that they are for has splits of its own.
        FileError: A file cannot be read, or a list names an image without captions or one that is listed already.
    """
    images: Optional[Images] = None
    rows: Iterable[tuple[str, Any]] = ()
    read = _csv_image
    if path.endswith('.csv'):
        rows = read_csv(path)
    elif not path.endswith('.json'):
        images = captions_of_lines(path).items()
    elif isinstance(content := read_json(path), list):
        images = _of_list(content, path)
    elif isinstance(content, dict) and 'annotations' in content:
        images = _of_coco(content, path)
    else:
        rows, read = numbered(field(content, 'images', path), f'{path}, image'), _karpathy_image
    if images is None:
        by_split: dict[Optional[str], list[tuple[str, Any]]] = {}
        for where, record in rows:
            by_split.setdefault(text_field(record, 'split', where), []).append((where, record))
        if split_files:
            raise ConfigError(f'source.split_files: {path} has splits of its own, expected a file without splits')
        return {split: starmap(read, records) for split, records in by_split.items()}
    if not split_files:
        return {None: images}
    captions = dict(images)
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


def official_lists(path: str) -> dict[str, str]:
    """The lists of Flickr8k's splits that lie beside its ``.token.txt`` file; beside another file, none."""
    files = {split: str(Path(path).with_name(name)) for split, name in _LISTS.items()}
    return {split: file for split, file in files.items() if path.endswith('.token.txt') and Path(file).is_file()}


def _karpathy_image(where: str, image: Any) -> tuple[str, list[str]]:
    folder = f'{text_field(image, "filepath", where)}/' if 'filepath' in image else ''
    return (folder + text_field(image, 'filename', where),
            [text_field(sentence, 'raw', where) for sentence in list_field(image, 'sentences', where)])


def _csv_image(where: str, row: Mapping[str, str]) -> tuple[str, list[str]]:
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
    captions: dict[str, list[str]] = {}
    for where, annotation in numbered(content['annotations'], f'{path}, annotation'):
        captions.setdefault(str(field(annotation, 'image_id', where)), []).append(
            text_field(annotation, 'caption', where))
    for where, image in numbered(field(content, 'images', path), f'{path}, image'):
        yield text_field(image, 'file_name', where), captions.get(str(field(image, 'id', where)), [])


def captions_of_lines(path: str) -> dict[str, list[str]]:
    """Image file -> captions.

    Lines are ``<image>#<number><tab or space><caption>``, where number and ``.jpg`` may be missing; or, mostly under a
    header, ``<image>.jpg,<caption>``, where Kaggle's files quote captions with commas and CLIP_benchmark's do not.
    Chinese that is split into words with their parts of speech is put together again.

    Raises:
        FileError: A line has neither form, or a quote is not closed; the message names file and line.
    """
    captions: dict[str, list[str]] = {}
    lines = list(read_lines(path))
    form = _COMMA if any(_COMMA.fullmatch(line) for _, line in lines[1:2]) else _NUMBERED
    if form is _COMMA and not _COMMA.fullmatch(lines[0][1]):
        lines = lines[1:]
    found = []
    for where, line in lines:
        if (match := form.fullmatch(line)) is None:
            raise FileError(f'{where}: expected `<image>#<number><tab><caption>` or `<image>.jpg,<caption>`, found '
                            f'{line[:60]!r}')
        found.append((where, match['image'], match['caption']))
    quoted = form is _COMMA and not any(',' in caption and caption[0] != '"' for _, _, caption in found)
    for where, image, caption in found:
        if quoted:
            with reading(where, 'a row in which every quote that is opened is closed, and one in a text is doubled'):
                values = next(csv.reader([caption], strict=True), [''])
            if len(values) > 1:
                raise FileError(f'{where}: has {len(values) + 1} values, expected an image and a caption; a text with '
                                'commas needs quotes')
            caption = values[0]
        elif _SEGMENTED.fullmatch(caption):
            caption = ''.join(word.rsplit(':', 1)[0] for word in caption.split())
        captions.setdefault(image if '.' in image else f'{image}.jpg', []).append(caption)
    return captions
