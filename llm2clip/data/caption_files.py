# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of captions, with or without their images: CSV, TSV, JSON and JSON lines."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2clip.config import ConfigError

__all__ = ['read_captions']


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
    records = _json_records(captions) if suffix in ('.json', '.jsonl', '.jsonlines') else _csv_records(captions)
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


def _csv_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, delimiter='\t' if path.endswith('.tsv') else ',')
        columns = reader.fieldnames or ()
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f'{path}:{reader.line_num}: expected {len(columns)} values, one per column of '
                                 f'{", ".join(columns)}; a text with commas needs quotes')
            yield path, row


def _json_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding='utf-8-sig') as file:
        parts = [(path, file.read())] if path.endswith('.json') else \
            [(f'{path}:{number}', line) for number, line in enumerate(file, 1) if line.strip()]
    for where, text in parts:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f'{where}: not JSON: {error}') from None
        for record in value if path.endswith('.json') and isinstance(value, list) else [value]:
            if not isinstance(record, dict):
                raise ValueError(f'{where}: expected objects with a column each, found {str(record)[:60]!r}')
            yield where, record
