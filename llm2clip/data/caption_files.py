# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Readers of caption files: CSV, TSV, JSON, JSON lines and lines.

All readers check that texts can be written in UTF-8, and raise an error that names the place of another text.
"""

import csv
import posixpath
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import parse_json, read_json, reading

QUOTES = 'a row in which every quote that is opened is closed, and one in a text is doubled'
UTF8 = 'a text in UTF-8 (save a spreadsheet as "CSV UTF-8", not as .xlsx and not in Windows-1252)'


def normal_path(name: str) -> str:
    """Normalise the path of an image: ``./a.jpg`` and ``b/../a.jpg`` become ``a.jpg``; a URL stays."""
    if '://' in name:
        return name
    return posixpath.normpath(name)


def read_captions(
    captions: str, image_column: str, caption_column: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Read image (its `normal_path`) -> captions, both in the order of the file, without empty captions; and
    the places of the rows that name no image.

    Args:
        captions: ``.json`` (a list of objects), ``.jsonl`` or ``.jsonlines`` (an object per line), ``.tsv``,
            or any other name for CSV.  TSV and CSV need a header.  An image may have several rows.
        image_column: Column with the image, by which captions are grouped.
        caption_column: Column with the text; in JSON it may also be a list of texts.

    Raises:
        ConfigError, FileError: The file is missing or damaged, lacks a column, or names no image.
    """
    suffix = Path(captions).suffix
    records: Iterable[tuple[str, Any]]
    if suffix == '.json':
        records = ((f'{captions}, value {i}', record) for i, record in enumerate(read_json(captions, list)))
    elif suffix in ('.jsonl', '.jsonlines'):
        records = read_json_lines(captions)
    else:
        _, records = read_csv(captions)
    texts: dict[str, list[str]] = {}
    without_image: list[str] = []
    for where, record in records:
        image = text_field(record, image_column, where)
        if not image.strip():
            without_image.append(where)
            continue
        values = field(record, caption_column, where)
        if not isinstance(values, list):
            values = [values]
        lines = [optional_text(value, f'{where}: {caption_column!r}') for value in values]
        texts.setdefault(normal_path(image), []).extend(line for line in lines if line.strip())
    if not texts:
        raise FileError(f'has no row with a text in {image_column!r}, expected one row per caption', captions)
    return texts, without_image


def check_text(text: str, where: str) -> str:
    """Return `text` if it can be written in UTF-8.

    A NUL character, an unpaired surrogate or an undecodable byte raises a FileError that names `where`.
    """
    if '\0' in text:
        raise FileError(f'has a NUL character, expected {UTF8}', where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # U+DC80 to U+DCFF stand for the bytes 0x80 to 0xFF that are not UTF-8.
        raise FileError(f'has {text[error.start]!r}, expected {UTF8}', where) from None
    return text


def _text_lines(path: str, newline: Optional[str] = None) -> Iterator[str]:
    """Lines of a text file, with their line ends."""
    with reading(path, 'a text in UTF-8'), open(
            path, encoding='utf-8-sig', errors='surrogateescape', newline=newline) as file:
        for number, line in enumerate(file, 1):
            yield check_text(line, f'{path}:{number}')


def read_csv(path: str) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Return the columns of a CSV or ``.tsv`` file, and an iterator of its rows, each with ``<path>:<line>``.

    White space around values is removed, and blank rows are skipped.

    Raises:
        FileError: The file is not a valid table; the message names file and line.
    """
    rows = _csv_rows(path)
    where, columns = next(rows, (path, []))
    names = list(filter(None, columns))
    if len({*names}) < len(names):
        raise FileError(f'has the columns {", ".join(columns)}, expected different names', where)
    return columns, ((where, dict(zip(columns, row))) for where, row in rows)


def _csv_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """Non-blank rows of a CSV file, the header first, all with the same number of values."""
    header = next(filter(str.strip, _text_lines(path)), '')
    usual = '\t' if path.endswith('.tsv') else ','
    delimiter = max(f'{usual};\t,', key=header.count)  # the usual one if none is more frequent
    reader = csv.reader(_text_lines(path, newline=''), delimiter=delimiter, strict=True)
    columns: list[str] = []
    row: Optional[list[str]] = []
    while row is not None:
        where = f'{path}:{reader.line_num + 1}'
        with reading(where, QUOTES):
            row = next(reader, None)
        cells = [cell.strip() for cell in row or ()]
        if any(cells):
            columns = columns or cells
            if len(cells) != len(columns):
                raise FileError(f'has {len(cells)} values, expected {len(columns)}, one per column of '
                                f'{", ".join(columns)}; a text with {delimiter!r} needs quotes', where)
            yield where, cells


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Return the non-blank lines of a text file, stripped, each with ``<path>:<number>``."""
    lines = map(str.strip, _text_lines(path))
    return ((f'{path}:{number}', line) for number, line in enumerate(lines, 1) if line)


def read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Return the values of a JSON lines file, each with ``<path>:<number>``; FileError for a damaged line."""
    return ((where, parse_json(line, where)) for where, line in read_lines(path))


def field(record: Any, key: str, where: str) -> Any:
    """Return a field of a JSON object or a row; a ConfigError names a missing field and the existing ones."""
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where}: expected an object with {key!r}, found {str(record)[:60]!r}')
    if key not in record:
        names = textwrap.shorten(', '.join(map(str, record)), width=200, placeholder=' …')
        raise ConfigError(f'{where} has no {key!r}; it has {names}')
    return record[key]


def text_field(record: Any, key: str, where: str) -> str:
    """Return a field that must be a text; FileError if it is not."""
    value = field(record, key, where)
    if value is None:
        raise FileError(f'{key!r} is null, expected a text', where)
    return optional_text(value, f'{where}: {key!r}')


def optional_text(value: Any, where: str) -> str:
    """Return a text, or an empty one for None; FileError for any other value."""
    if value is None:
        return ''
    if not isinstance(value, str):
        raise FileError(f'{str(value)[:60]!r}, expected a text', where)
    return check_text(value, where)
