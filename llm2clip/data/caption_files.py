# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Readers of caption files: CSV, TSV, JSON, JSON lines, lines, and the files of Flickr8k, Flickr30k and COCO.

All readers check that texts can be written in UTF-8, and raise an error that names the place of another text.
"""

import csv
import functools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any, Optional

from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import parse_json, read_json, reading

# Path of each image, relative to the folder of images, with its captions.
_Images = Iterable[tuple[str, list[str]]]

_SHOWN = 8
_QUOTES = 'a row in which every quote that is opened is closed, and one in a text is doubled'
# Flickr8k's official lists; Karpathy and Fei-Fei call the `dev` images `val`.
_LISTS = {'train': 'Flickr_8k.trainImages.txt', 'val': 'Flickr_8k.devImages.txt',
          'test': 'Flickr_8k.testImages.txt'}
# `1000092795.jpg#0<tab>A caption`, `1009692167#zhm#1 <caption>`, `6228559981<tab><caption>`
_NUMBERED = re.compile(r'(?P<image>[^#\s,]+)(?:#\S*)?\s+(?P<caption>.+)')
# `1007129816.jpg,A caption`
_COMMA = re.compile(r'(?P<image>[^\s,]+\.jpg),(?P<caption>.*)')
# `一条:q 狗:n 。:wj`: words with part-of-speech tags
_SEGMENTED = re.compile(r'\S+:[a-z]+[0-9]*(?:\s+\S+:[a-z]+[0-9]*)*')


def normal_path(name: str) -> str:
    """Normalise the path of an image: ``./a.jpg`` and ``b/../a.jpg`` become ``a.jpg``; a URL stays."""
    if '://' in name:
        return name
    return posixpath.normpath(name)


def check_image_paths(paths: Iterable[Optional[str]], images: Optional[str], where: str) -> None:
    """Raise a FileError if two paths, relative to the folder `images` or absolute, name the same file.
    Links to folders are followed; those to files are not, since this would access the disk for each image."""
    real_folder = functools.cache(lambda folder: os.path.realpath(os.path.join(images or '', folder)))
    first_paths: dict[tuple[str, str], str] = {}
    for path in filter(None, paths):
        name = check_text(normal_path(path), where)
        folder, file = posixpath.split(name)
        first = first_paths.setdefault((real_folder(folder), file), name)
        if first != name:
            raise FileError(f'{where}: {first!r} and {name!r} are the same image, expected one path for each image')


def read_captions(captions: str, image_column: str, caption_column: str) -> dict[str, list[str]]:
    """Read image (its `normal_path`) -> captions, both in the order of the file.  Empty captions are skipped.

    Args:
        captions: ``.json`` (a list of objects), ``.jsonl`` or ``.jsonlines`` (an object per line), ``.tsv``,
            or any other name for CSV.  TSV and CSV need a header.  An image may have several rows.
        image_column: Column with the image, by which captions are grouped.
        caption_column: Column with the text; in JSON it may also be a list of texts.

    Raises:
        ConfigError, FileError: The file is missing or damaged, has no caption, or lacks a column.
    """
    if not Path(captions).is_file():
        raise ConfigError(f'source.captions: there is no file {Path(captions).absolute()}')
    suffix = Path(captions).suffix
    records: Iterable[tuple[str, Any]]
    if suffix == '.json':
        content = read_json(captions)
        records = numbered(content if isinstance(content, list) else [content], f'{captions}, value')
    elif suffix in ('.jsonl', '.jsonlines'):
        records = read_json_lines(captions)
    else:
        _, records = read_csv(captions)
    texts: dict[str, list[str]] = {}
    for where, record in records:
        image = normal_path(text_field(record, image_column, where))
        values = field(record, caption_column, where)
        if not isinstance(values, list):
            values = [values]
        lines = [optional_text(value, f'{where}: {caption_column!r}') for value in values]
        texts.setdefault(image, []).extend(line for line in lines if line.strip())
    if not any(texts.values()):
        raise ConfigError(f'{captions} has no {"captions" if texts else "rows"}')
    return texts


def check_text(text: str, where: str) -> str:
    """Return `text` if it can be written in UTF-8.

    A NUL character, an unpaired surrogate or an undecodable byte raises a FileError that names `where`.
    """
    if '\0' in text:
        raise FileError(f'{where}: has a NUL character, expected a text in UTF-8')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        character = f'the half character U+{code:X}'
        if 0xDC80 <= code <= 0xDCFF:  # the range of `surrogateescape`
            character = f'the byte 0x{code - 0xDC00:02x}'
        raise FileError(f'{where}: has {character}, expected a text in UTF-8') from None
    return text


def _text_lines(path: str, newline: Optional[str] = None) -> Iterator[str]:
    """Lines of a text file, with their line ends."""
    with reading(path, 'a text in UTF-8'), open(
            path, encoding='utf-8-sig', errors='surrogateescape', newline=newline) as file:
        for number, line in enumerate(file, 1):
            yield check_text(line, f'{path}:{number}')


def read_csv(path: str) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Return the columns of a CSV or ``.tsv`` file, and an iterator of its rows, each with ``<path>:<line>``.

    Raises:
        FileError: The file is not a valid table; the message names file and line.
    """
    rows = _csv_rows(path)
    where, columns = next(rows, (path, []))
    if len(columns) == 1 and re.search('[;\t,]', columns[0]):
        raise FileError(f'{where}: has one column, {columns[0]!r}, expected commas between columns, or tabs in .tsv')
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise FileError(f'{where}: has two columns {repeated[0]!r}, expected different names')

    def records() -> Iterator[tuple[str, dict[str, str]]]:
        for where, row in rows:
            if len(row) != len(columns):
                raise FileError(f'{where}: has {len(row)} values, expected {len(columns)}, one per column of '
                                f'{", ".join(columns)}; a text with commas needs quotes')
            yield where, dict(zip(columns, row))

    return columns, records()


def _csv_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """Non-blank rows of a CSV file, the header first."""
    delimiter = '\t' if path.endswith('.tsv') else ','
    reader = csv.reader(_text_lines(path, newline=''), delimiter=delimiter, strict=True)
    while True:
        where = f'{path}:{reader.line_num + 1}'
        with reading(where, _QUOTES):
            row = next(reader, None)
        if row is None:
            return
        if row:
            yield where, row


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Return the non-blank lines of a text file, stripped, each with ``<path>:<number>``."""
    lines = map(str.strip, _text_lines(path))
    return ((f'{path}:{number}', line) for number, line in enumerate(lines, 1) if line)


def read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Return the values of a JSON lines file, each with ``<path>:<number>``; FileError for a damaged line."""
    return ((where, parse_json(line, where)) for where, line in read_lines(path))


def numbered(values: Any, name: str) -> list[tuple[str, Any]]:
    """Return the values of a list, each with its position ``<name> <number>``; FileError if it is no list."""
    if not isinstance(values, list):
        raise FileError(f'{name}s: found {_short(values)}, expected a list')
    return [(f'{name} {i}', value) for i, value in enumerate(values)]


def field(record: Any, key: str, where: str) -> Any:
    """Return a field of a JSON object or a row; a ConfigError names a missing field and the existing ones."""
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where}: expected an object with {key!r}, found {_short(record)}')
    if key not in record:
        names = list(map(str, record))
        existing = ', '.join(names[:_SHOWN])
        if len(names) > _SHOWN:
            existing += f' and {len(names) - _SHOWN:,} more'
        raise ConfigError(f'{where} has no {key!r}; it has {existing}')
    return record[key]


def _list_field(record: Any, key: str, where: str) -> list[Any]:
    """Field that must be a list."""
    value = field(record, key, where)
    if not isinstance(value, list):
        raise FileError(f'{where}: {key!r} is {_short(value)}, expected a list')
    return value


def texts_field(record: Any, key: str, where: str) -> list[str]:
    """Return a field that must be a list of texts; FileError if it is not."""
    return [text_field({key: text}, key, where) for text in _list_field(record, key, where)]


def text_field(record: Any, key: str, where: str) -> str:
    """Return a field that must be a text; FileError if it is not."""
    value = field(record, key, where)
    if not isinstance(value, str):
        raise FileError(f'{where}: {key!r} is {_short(value)}, expected a text')
    return check_text(value, f'{where}: {key!r}')


def optional_text(value: Any, where: str) -> str:
    """Return a text, or an empty one for None; FileError for any other value."""
    if value is not None and not isinstance(value, str):
        raise FileError(f'{where} is {_short(value)}, expected a text')
    return check_text(value or '', where)


def _short(value: Any) -> str:
    """Shortened value for error messages."""
    return repr(str(value)[:60])


# ----------------------------------------------------------------------------- Flickr8k, Flickr30k and COCO


def read_splits(path: str, split_files: Optional[Mapping[str, str]] = None) -> dict[Optional[str], _Images]:
    """Read split -> images with their captions, as iterables that may be read only once.

    Images in no split have the key None, and so do all images of a file without splits.

    Args:
        path: One of

            - JSON of Karpathy and Fei-Fei, which has splits (``dataset_flickr8k.json``),
            - CSV of nlphuji/flickr30k, which has splits (``flickr_annotations_30k.csv``),
            - JSON in COCO's own format (``captions_train2017.json``),
            - a JSON list of ``{image, caption}``, as ALBEF and BLIP use it, with one caption or several,
            - under any other name, lines for `captions_of_lines` (``Flickr8k.token.txt``, ``captions.txt``).
        split_files: For a file without splits: split -> file with one image per line.

    Raises:
        ConfigError: A field or a file of `split_files` is missing, or the file has splits of its own.
        FileError: A file cannot be read, or `split_files` name an image twice or an image without captions.
    """
    if path.endswith('.csv'):
        _, rows = read_csv(path)
        return _recorded_splits(rows, _csv_image, path, split_files)
    if not path.endswith('.json'):
        images = captions_of_lines(path).items()
    else:
        content = read_json(path)
        if isinstance(content, list):
            images = _list_images(content, path)
        elif isinstance(content, dict) and 'annotations' in content:
            images = _coco_images(content, path)
        else:
            rows = numbered(field(content, 'images', path), f'{path}, image')
            return _recorded_splits(rows, _karpathy_image, path, split_files)
    if not split_files:
        return {None: images}
    return _listed_splits(dict(images), path, split_files)


def _recorded_splits(
    rows: Iterable[tuple[str, Any]], read_image: Callable[[str, Any], tuple[str, list[str]]], path: str,
    split_files: Optional[Mapping[str, str]],
) -> dict[Optional[str], _Images]:
    """Split -> images of a file whose rows have the field `split`."""
    splits: dict[Optional[str], list[tuple[str, Any]]] = {}
    for where, record in rows:
        splits.setdefault(text_field(record, 'split', where), []).append((where, record))
    if split_files:
        raise ConfigError(f'source.split_files: {path} has splits of its own, expected a file without splits')
    return {split: starmap(read_image, records) for split, records in splits.items()}


def _listed_splits(
    captions: dict[str, list[str]], path: str, split_files: Mapping[str, str]
) -> dict[Optional[str], _Images]:
    """Split -> images that its file lists; None -> the images that no file lists."""
    if not captions:
        raise ConfigError(f'{path} has no images')
    splits: dict[Optional[str], _Images] = {}
    split_of: dict[str, str] = {}
    for split, file in split_files.items():
        if not Path(file).is_file():
            raise ConfigError(f'source.split_files.{split}: there is no file {Path(file).absolute()}')
        images: list[tuple[str, list[str]]] = []
        for where, image in read_lines(file):
            if image in split_of:
                raise FileError(f'{where}: image {image} is listed already, in {split_files[split_of[image]]}')
            if image not in captions:
                raise FileError(f'{where}: image {image[:60]} has no captions in {path}')
            split_of[image] = split
            images.append((image, captions[image]))
        splits[split] = images
    splits[None] = [(image, lines) for image, lines in captions.items() if image not in split_of]
    return splits


def official_lists(path: str) -> dict[str, str]:
    """Return split -> official Flickr8k list beside the ``.token.txt`` file; empty for other files."""
    if not path.endswith('.token.txt'):
        return {}
    files = {split: Path(path).with_name(name) for split, name in _LISTS.items()}
    return {split: str(file) for split, file in files.items() if file.is_file()}


def _karpathy_image(where: str, image: Any) -> tuple[str, list[str]]:
    folder = ''
    if 'filepath' in image:
        folder = text_field(image, 'filepath', where) + '/'
    name = text_field(image, 'filename', where)
    captions = [text_field(sentence, 'raw', where) for sentence in _list_field(image, 'sentences', where)]
    return folder + name, captions


def _csv_image(where: str, row: Mapping[str, str]) -> tuple[str, list[str]]:
    """Image and captions of a row, which has the captions as a JSON list in one cell."""
    file = text_field(row, 'filename', where)
    captions = parse_json(text_field(row, 'raw', where), f'{where}, {file}: \'raw\'')
    return file, texts_field({'raw': captions}, 'raw', f'{where}, {file}')


def _list_images(content: list[Any], path: str) -> _Images:
    """Images of a list, which has one record per caption for training, or one per image for evaluation."""
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


def _coco_images(content: dict[str, Any], path: str) -> _Images:
    captions: dict[str, list[str]] = {}
    for where, annotation in numbered(content['annotations'], f'{path}, annotation'):
        image_id = str(field(annotation, 'image_id', where))
        captions.setdefault(image_id, []).append(text_field(annotation, 'caption', where))
    for where, image in numbered(field(content, 'images', path), f'{path}, image'):
        name = text_field(image, 'file_name', where)
        yield name, captions.get(str(field(image, 'id', where)), [])


def captions_of_lines(path: str) -> dict[str, list[str]]:
    """Read image file -> captions from a file with one caption per line.

    Lines are ``<image>#<number><tab or space><caption>``, where the number and ``.jpg`` may be missing, or
    ``<image>.jpg,<caption>``, usually after a header.  Kaggle's files quote captions with commas,
    CLIP_benchmark's do not.  Chinese captions, segmented into words with part-of-speech tags, are joined.

    Raises:
        FileError: A line has neither form, or a quote is not closed; the message names file and line.
    """
    lines = list(read_lines(path))
    has_commas = len(lines) > 1 and _COMMA.fullmatch(lines[1][1]) is not None
    if has_commas and not _COMMA.fullmatch(lines[0][1]):
        del lines[0]  # the header
    form = _COMMA if has_commas else _NUMBERED
    rows: list[tuple[str, str, str]] = []
    for where, line in lines:
        match = form.fullmatch(line)
        if match is None:
            raise FileError(f'{where}: expected `<image>#<number><tab><caption>` or `<image>.jpg,<caption>`, found '
                            f'{line[:60]!r}')
        rows.append((where, match['image'], match['caption']))
    is_quoted = has_commas and not any(',' in caption and caption[0] != '"' for _, _, caption in rows)
    captions: dict[str, list[str]] = {}
    for where, image, caption in rows:
        if is_quoted:
            with reading(where, _QUOTES):
                values = next(csv.reader([caption], strict=True), [''])
            if len(values) > 1:
                raise FileError(f'{where}: has {len(values) + 1} values, expected an image and a caption; a text '
                                'with commas needs quotes')
            caption = values[0]
        elif _SEGMENTED.fullmatch(caption):
            caption = ''.join(word.rsplit(':', 1)[0] for word in caption.split())
        if '.' not in image:
            image += '.jpg'
        captions.setdefault(image, []).append(caption)
    return captions
