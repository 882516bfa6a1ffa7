# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of captions, with or without their images: CSV, TSV, JSON, JSON lines, and plain lines."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

from llm2clip.config import ConfigError

__all__ = [
    'field', 'parse_json', 'read_captions', 'read_csv', 'read_json', 'read_json_lines', 'read_lines', 'text_field',
    'texts_field',
]


def read_captions(captions: str, image_column: str, caption_column: str) -> dict[str, list[str]]:
    """Image -> its captions, both in the order of the file.  Empty captions are none.

    Args:
        captions: ``.json`` (a list of objects), ``.jsonl`` or ``.jsonlines`` (one object per line), ``.tsv``, or CSV
            under any other name; the last two with a header.  An image may have several rows.
        image_column: Column that says which captions belong together.
        caption_column: Column with the text; in JSON it may also be a list of texts.

    Raises:
        ConfigError: The file is missing, has no caption, or lacks a column.
        ValueError: A row is cut off or not of this form; the message names file and line.
    """
    if not Path(captions).is_file():
        raise ConfigError(f'source.captions: there is no file {Path(captions).absolute()}')
    suffix = Path(captions).suffix
    if suffix == '.json':
        value = read_json(captions)
        records: Iterable[tuple[str, Any]] = [(captions, record)
                                              for record in (value if isinstance(value, list) else [value])]
    else:
        records = read_json_lines(captions) if suffix in ('.jsonl', '.jsonlines') else read_csv(captions)
    texts: dict[str, list[str]] = {}
    for where, record in records:
        image, caption = field(record, image_column, where), field(record, caption_column, where)
        lines = [line for line in (caption if isinstance(caption, list) else [caption]) if line is not None]
        if not isinstance(image, str) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f'{where}: expected texts in {image_column!r} and {caption_column!r}, found {image!r} '
                             f'and {caption!r}')
        texts.setdefault(image, []).extend(line for line in lines if line.strip())
    if not any(texts.values()):
        raise ConfigError(f'{captions} has no {"captions" if texts else "rows"}')
    return texts


def read_csv(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file, or of one whose name ends with ``.tsv``, by their columns, each with its file.

    Raises:
        ValueError: A row has more or fewer values than the header.
    """
    with open(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, delimiter='\t' if path.endswith('.tsv') else ',')
        columns = reader.fieldnames or ()
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f'{path}:{reader.line_num}: expected {len(columns)} values, one per column of '
                                 f'{", ".join(columns)}; a text with commas needs quotes')
            yield path, row


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with ``<path>:<number>``."""
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f'{path}:{number}', line.strip()


def read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON lines file, each with ``<path>:<number>``; a ValueError names a line that is damaged."""
    return ((where, parse_json(line, where)) for where, line in read_lines(path))


def read_json(path: str) -> Any:
    """The content of a JSON file; a ValueError names one that is damaged."""
    return parse_json(Path(path).read_text(encoding='utf-8-sig'), path)


def parse_json(text: Union[str, bytes], where: str) -> Any:
    """The value of a JSON text; a ValueError says where one stands that is damaged."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f'{where}: not JSON: {error}') from None


def field(record: Any, key: str, where: str) -> Any:
    """A field of a JSON object or a column of a row, or a ConfigError that names it and those that are there."""
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where}: expected an object with {key!r}, found {str(record)[:60]!r}')
    if key not in record:
        raise ConfigError(f'{where} has no {key!r}; it has {", ".join(map(str, record))}')
    return record[key]


def text_field(record: Any, key: str, where: str) -> str:
    """A field that is a text."""
    value = field(record, key, where)
    if not isinstance(value, str):
        raise ValueError(f'{where}: {key!r} should be a text, found {str(value)[:60]!r}')
    return value


def texts_field(record: Any, key: str, where: str) -> list[str]:
    """A field that is a list of texts."""
    value = field(record, key, where)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f'{where}: {key!r} should be a list of texts, found {str(value)[:60]!r}')
    return value
