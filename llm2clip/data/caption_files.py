# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of captions, with or without their images: CSV, TSV, JSON, JSON lines, and plain lines.

Whatever is read here is text in UTF-8 that can be written again, or an error says where it is not.
"""

import csv
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.files import FileError, parse_json, read_json, reading

__all__ = [
    'check_text', 'csv_rows', 'field', 'list_field', 'normal_path', 'numbered', 'optional_text', 'read_captions',
    'read_csv', 'read_json_lines', 'read_lines', 'text_field', 'texts_field',
]

_SHOWN = 8


def normal_path(name: str) -> str:
    """The path of an image in its normal form: ``./a.jpg`` and ``b/../a.jpg`` are ``a.jpg``; a URL stays as it is."""
    return name if '://' in name else posixpath.normpath(name)


def read_captions(captions: str, image_column: str, caption_column: str) -> dict[str, list[str]]:
    """Image, as a `normal_path` -> its captions, both in the order of the file.  Empty captions are none.

    Args:
        captions: ``.json`` (a list of objects), ``.jsonl`` or ``.jsonlines`` (one object per line), ``.tsv``, or CSV
            under any other name; the last two with a header.  An image may have several rows.
        image_column: Column that says which captions belong together.
        caption_column: Column with the text; in JSON it may also be a list of texts.

    Raises:
        ConfigError: The file is missing, has no caption, or lacks a column.
        FileError: It cannot be read, or a row is cut off or not of this form; the message names file and line.
    """
    if not Path(captions).is_file():
        raise ConfigError(f'source.captions: there is no file {Path(captions).absolute()}')
    suffix = Path(captions).suffix
    if suffix == '.json':
        value = read_json(captions)
        records = numbered(value if isinstance(value, list) else [value], f'{captions}, value')
    else:
        records = read_json_lines(captions) if suffix in ('.jsonl', '.jsonlines') else read_csv(captions)
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
    """A text, if it is one that can be written in UTF-8.

    A FileError says that it has a NUL character, half a surrogate pair, or a byte that was no UTF-8.
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
    """The lines of a text file, with their ends."""
    expected = 'a text in UTF-8'
    with reading(path, expected), open(path, encoding='utf-8-sig', errors='surrogateescape', newline=newline) as file:
        for number, line in enumerate(file, 1):
            yield check_text(line, f'{path}:{number}')


def csv_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """The header of a CSV file and its rows that are not blank, each with ``<path>:<line>``; errors as for `read_csv`.
    """
    reader = csv.reader(_text_lines(path, newline=''), delimiter='\t' if path.endswith('.tsv') else ',', strict=True)
    is_header = True
    while True:
        where = f'{path}:{reader.line_num + 1}'
        with reading(where, 'a row in which every quote that is opened is closed, and one in a text is doubled'):
            row = next(reader, None)
        if row is None:
            return
        if is_header and (twice := [name for name in row if row.count(name) > 1]):
            raise FileError(f'{where}: has two columns {twice[0]!r}, expected different names')
        if row:
            is_header = False
            yield where, row


def read_csv(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, or of one whose name ends with ``.tsv``, by their columns, each with ``<path>:<line>``.

    Raises:
        FileError: It is no text in UTF-8, a quote is not closed, a row has more or fewer values than the header, or two
            columns have one name; the message names file and line.
    """
    rows = csv_rows(path)
    _, columns = next(rows, ('', []))
    for where, row in rows:
        if len(row) != len(columns):
            raise FileError(f'{where}: has {len(row)} values, expected {len(columns)}, one per column of '
                            f'{", ".join(columns)}; a text with commas needs quotes')
        yield where, dict(zip(columns, row))


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with ``<path>:<number>``."""
    return ((f'{path}:{number}', line.strip()) for number, line in enumerate(_text_lines(path), 1) if line.strip())


def read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON lines file, each with ``<path>:<number>``; a FileError names a line that is damaged."""
    return ((where, parse_json(line, where)) for where, line in read_lines(path))


def numbered(values: Any, what: str) -> list[tuple[str, Any]]:
    """Values of a list, each with where it stands: ``<what> <number>``."""
    if not isinstance(values, list):
        raise FileError(f'{what}s: found {_short(values)}, expected a list')
    return [(f'{what} {i}', value) for i, value in enumerate(values)]


def field(record: Any, key: str, where: str) -> Any:
    """A field of a JSON object or a column of a row, or a ConfigError that names it and those that are there."""
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where}: expected an object with {key!r}, found {_short(record)}')
    if key not in record:
        names = [f'{name}' for name in record]
        more = f' and {len(names) - _SHOWN:,} more' if len(names) > _SHOWN else ''
        raise ConfigError(f'{where} has no {key!r}; it has {", ".join(names[:_SHOWN])}{more}')
    return record[key]


def list_field(record: Any, key: str, where: str) -> list[Any]:
    """A field that is a list."""
    value = field(record, key, where)
    if not isinstance(value, list):
        raise FileError(f'{where}: {key!r} is {_short(value)}, expected a list')
    return value


def texts_field(record: Any, key: str, where: str) -> list[str]:
    """A field that is a list of texts."""
    return [text_field({key: text}, key, where) for text in list_field(record, key, where)]


def text_field(record: Any, key: str, where: str) -> str:
    """A field that is a text."""
    value = field(record, key, where)
    if not isinstance(value, str):
        raise FileError(f'{where}: {key!r} is {_short(value)}, expected a text')
    return check_text(value, f'{where}: {key!r}')


def optional_text(value: Any, where: str) -> str:
    """A text, or an empty one for null."""
    if value is not None and not isinstance(value, str):
        raise FileError(f'{where} is {_short(value)}, expected a text')
    return check_text(value or '', where)


def _short(value: Any) -> str:
    """For messages."""
    return repr(str(value)[:60])
