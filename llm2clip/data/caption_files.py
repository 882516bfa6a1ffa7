# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Readers of caption files: CSV, TSV, JSON, JSON lines, plain lines, and the files of Flickr8k, Flickr30k and COCO.

All readers check that texts can be written in UTF-8, and raise an error that names the place of one that cannot.
"""

import csv
import functools
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.files import FileError, parse_json, read_json, reading

# Path of each image, relative to the folder of images, with its captions.
_Images = Iterable[tuple[str, list[str]]]

_SHOWN = 8
_QUOTES = 'a row in which every quote that is opened is closed, and one in a text is doubled'
# Flickr8k's official lists; Karpathy and Fei-Fei call the `dev` images `val`.
_LISTS = {'train': 'Flickr_8k.trainImages.txt', 'val': 'Flickr_8k.devImages.txt', 'test': 'Flickr_8k.testImages.txt'}
# `1000092795.jpg#0<tab>A caption`, `1009692167#zhm#1 <caption>`, `6228559981<tab><caption>`
_NUMBERED = re.compile(r'(?P<image>[^#\s,]+)(?:#\S*)?\s+(?P<caption>.+)')
# `1007129816.jpg,A caption`
_COMMA = re.compile(r'(?P<image>[^\s,]+\.jpg),(?P<caption>.*)')
# `一条:q 狗:n 。:wj`: words with part-of-speech tags
_SEGMENTED = re.compile(r'\S+:[a-z]+[0-9]*(?:\s+\S+:[a-z]+[0-9]*)*')


def normal_path(name: str) -> str:
    """Normalise the path of an image: ``./a.jpg`` and ``b/../a.jpg`` become ``a.jpg``; a URL is returned unchanged."""
    return name if '://' in name else posixpath.normpath(name)


def check_image_paths(paths: Iterable[Optional[str]], images: Optional[str], where: str) -> None:
    """Raise a FileError if two paths, relative to the folder `images` or absolute, name one file of one folder.
    Links of folders are followed; those of files are not, since this would need disk access for each image."""
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
        captions: ``.json`` (a list of objects), ``.jsonl`` or ``.jsonlines`` (one object per line), ``.tsv``, or any
            other name for CSV.  TSV and CSV need a header.  An image may have several rows.
        image_column: Column with the image, by which captions are grouped.
        caption_column: Column with the text; in JSON it may also be a list of texts.

    Raises:
        ConfigError, FileError: The file is missing or damaged, has no caption, or lacks a column.
    """
    if not Path(captions).is_file():
        raise ConfigError(f'source.captions: there is no file {Path(captions).absolute()}')
    suffix = Path(captions).suffix
    if suffix == '.json':
        value = read_json(captions)
        records = numbered(value if isinstance(value, list) else [value], f'{captions}, value')
    else:
        records = read_json_lines(captions) if suffix in ('.jsonl', '.jsonlines') else read_csv(captions)[1]
    texts: dict[str, list[str]] = {}
    for where, record in records:
        image, caption = normal_path(text_field(record, image_column, where)), field(record, caption_column, where)
        lines = [optional_text(line, f'{where}: {caption_column!r}')
                 for line in (caption if isinstance(caption, list) else [caption])]
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
        what = f'the byte 0x{code - 0xDC00:02x}' if 0xDC80 <= code <= 0xDCFF else f'the half character U+{code:X}'
        raise FileError(f'{where}: has {what}, expected a text in UTF-8') from None
    return text


def _text_lines(path: str, newline: Optional[str] = None) -> Iterator[str]:
    """Lines of a text file, with their line ends."""
    expected = 'a text in UTF-8'
    with reading(path, expected), open(path, encoding='utf-8-sig', errors='surrogateescape', newline=newline) as file:
        for number, line in enumerate(file, 1):
            yield check_text(line, f'{path}:{number}')


def read_csv(path: str) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Return the columns of a CSV or ``.tsv`` file, and an iterator over its rows, each with ``<path>:<line>``.

    Raises:
        FileError: The file is not a valid table; the message names file and line.
    """
    rows = _csv_rows(path)
    where, columns = next(rows, (path, []))
    if len(columns) == 1 and re.search('[;\t,]', columns[0]):
        raise FileError(f'{where}: has one column, {columns[0]!r}, expected commas between columns, or tabs in .tsv')
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise FileError(f'{where}: has two columns {twice[0]!r}, expected different names')

    def records() -> Iterator[tuple[str, dict[str, str]]]:
        for where, row in rows:
            if len(row) != len(columns):
                raise FileError(f'{where}: has {len(row)} values, expected {len(columns)}, one per column of '
                                f'{", ".join(columns)}; a text with commas needs quotes')
            yield where, dict(zip(columns, row))

    return columns, records()


def _csv_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """Non-blank rows of a CSV file, the header first."""
    reader = csv.reader(_text_lines(path, newline=''), delimiter='\t' if path.endswith('.tsv') else ',', strict=True)
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
    return ((f'{path}:{number}', line.strip()) for number, line in enumerate(_text_lines(path), 1) if line.strip())


def read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Return the values of a JSON lines file, each with ``<path>:<number>``; a FileError names a damaged line."""
    return ((where, parse_json(line, where)) for where, line in read_lines(path))


def numbered(values: Any, what: str) -> list[tuple[str, Any]]:
    """Return the values of a list, each with its position ``<what> <number>``; FileError if it is not a list."""
    if not isinstance(values, list):
        raise FileError(f'{what}s: found {_short(values)}, expected a list')
    return [(f'{what} {i}', value) for i, value in enumerate(values)]


def field(record: Any, key: str, where: str) -> Any:
    """Return a field of a JSON object or of a row; a ConfigError names a missing field and the fields that exist."""
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where}: expected an object with {key!r}, found {_short(record)}')
    if key not in record:
        names = [f'{name}' for name in record]
        more = f' and {len(names) - _SHOWN:,} more' if len(names) > _SHOWN else ''
        raise ConfigError(f'{where} has no {key!r}; it has {", ".join(names[:_SHOWN])}{more}')
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


# ---------------------------------------------------------------------------------------------------------------------
# Flickr8k, Flickr30k and COCO
# ---------------------------------------------------------------------------------------------------------------------


def read_splits(path: str, split_files: Optional[Mapping[str, str]] = None) -> dict[Optional[str], _Images]:
    """Read split -> images with their captions, as iterables that may be read only once.

    Images in no split have the key None, and so do all images of a file without splits.

    Args:
        path: One of

            - JSON of Karpathy and Fei-Fei, which has splits (``dataset_flickr8k.json``),
            - CSV of nlphuji/flickr30k, which has splits (``flickr_annotations_30k.csv``),
            - JSON in COCO's own format (``captions_train2017.json``),
            - a JSON list of ``{image, caption}``, as ALBEF and BLIP use it, with one caption or a list of them,
            - under any other name, lines for `captions_of_lines` (``Flickr8k.token.txt``, ``captions.txt``).
        split_files: For a file without splits: split -> file with one image per line.

    Raises:
        ConfigError: A field or a file of `split_files` is missing, or `split_files` is set for a file with splits.
        FileError: A file cannot be read, or `split_files` name an image twice or an image without captions.
    """
    images: Optional[_Images] = None
    rows: Iterable[tuple[str, Any]] = ()
    read = _csv_image
    if path.endswith('.csv'):
        _, rows = read_csv(path)
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
    """Return split -> official Flickr8k list that exists beside the ``.token.txt`` file; empty for another file."""
    files = {split: str(Path(path).with_name(name)) for split, name in _LISTS.items()}
    return {split: file for split, file in files.items() if path.endswith('.token.txt') and Path(file).is_file()}


def _karpathy_image(where: str, image: Any) -> tuple[str, list[str]]:
    folder = f'{text_field(image, "filepath", where)}/' if 'filepath' in image else ''
    return (folder + text_field(image, 'filename', where),
            [text_field(sentence, 'raw', where) for sentence in _list_field(image, 'sentences', where)])


def _csv_image(where: str, row: Mapping[str, str]) -> tuple[str, list[str]]:
    """Image and captions of a row, which has the captions as a JSON list in one cell."""
    file = text_field(row, 'filename', where)
    captions = parse_json(text_field(row, 'raw', where), f'{where}, {file}: \'raw\'')
    return file, texts_field({'raw': captions}, 'raw', f'{where}, {file}')


def _of_list(content: list[Any], path: str) -> _Images:
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


def _of_coco(content: dict[str, Any], path: str) -> _Images:
    captions: dict[str, list[str]] = {}
    for where, annotation in numbered(content['annotations'], f'{path}, annotation'):
        captions.setdefault(str(field(annotation, 'image_id', where)), []).append(
            text_field(annotation, 'caption', where))
    for where, image in numbered(field(content, 'images', path), f'{path}, image'):
        yield text_field(image, 'file_name', where), captions.get(str(field(image, 'id', where)), [])


def captions_of_lines(path: str) -> dict[str, list[str]]:
    """Read image file -> captions from a file with one caption per line.

    Lines are ``<image>#<number><tab or space><caption>``, where the number and ``.jpg`` may be missing, or
    ``<image>.jpg,<caption>``, usually after a header.  Kaggle's files quote captions with commas, CLIP_benchmark's do
    not.  Chinese captions that are segmented into words with part-of-speech tags are joined.

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
            with reading(where, _QUOTES):
                values = next(csv.reader([caption], strict=True), [''])
            if len(values) > 1:
                raise FileError(f'{where}: has {len(values) + 1} values, expected an image and a caption; a text with '
                                'commas needs quotes')
            caption = values[0]
        elif _SEGMENTED.fullmatch(caption):
            caption = ''.join(word.rsplit(':', 1)[0] for word in caption.split())
        captions.setdefault(image if '.' in image else f'{image}.jpg', []).append(caption)
    return captions
