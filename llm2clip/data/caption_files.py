# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of captions, with or without their images: CSV, TSV, JSON, JSON lines, and plain lines."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm2clip.config import ConfigError

__all__ = ['read_captions', 'read_csv', 'read_json', 'read_json_lines', 'read_lines']


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
    records = _json_records(captions) if suffix in ('.json', '.jsonl', '.jsonlines') else read_csv(captions)
    texts: dict[str, list[str]] = {}
    for where, record in records:
        for column in (image_column, caption_column):
            if column not in record:
                raise ConfigError(f'{where} has no column {column!r}; it has {", ".join(record)}')
        image, caption = record[image_column], record[caption_column]
        lines = [line for line in (caption if isinstance(caption, list) else [caption]) if line is not None]
        if not isinstance(image, str) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f'{where}: expected texts in {image_column!r} and {caption_column!r}, found {image!r} '
                             f'and {caption!r}')
        texts.setdefault(image, []).extend(line for line in lines if line.strip())
    if not any(texts.values()):
        raise ConfigError(f'{captions} has no {"captions" if texts else "rows"}')
    return texts


def _json_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    records: Iterable[tuple[str, Any]] = read_json_lines(path)
    if path.endswith('.json'):
        value = read_json(path)
        records = [(path, record) for record in (value if isinstance(value, list) else [value])]
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f'{where}: expected objects with a column each, found {str(record)[:60]!r}')
        yield where, record


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
    return ((where, _parse(line, where)) for where, line in read_lines(path))


def read_json(path: str) -> Any:
    """The content of a JSON file; a ValueError names one that is damaged."""
    return _parse(Path(path).read_text(encoding='utf-8-sig'), path)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{where}: not JSON: {error}') from None
