# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A folder of images and a CSV file of captions."""

import csv
from collections.abc import Iterator
from pathlib import Path

from llm2clip.config import ConfigError
from llm2clip.data.convert.writer import Dropped, Sample

__all__ = ['image_folder']


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption', split: str = 'train'
) -> tuple[dict[str, Iterator[Sample]], Dropped]:
    """One split of images with their captions, called ``0``, ``1``, … in the order of the file.

    Every image gets as many captions as the image that has fewest.

    Args:
        images: Folder of the images.
        captions: CSV file with a header, one caption a row.
        image_column: Column with the image's path inside `images`.
        caption_column: Column with the text.
        split: Name of the split.
    """
    if not Path(captions).is_file():
        raise ConfigError(f'source.captions: there is no file {captions}')
    dropped = Dropped()
    texts: dict[str, list[str]] = {}
    with open(captions, newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        for column in (image_column, caption_column):
            if column not in (reader.fieldnames or ()):
                raise ConfigError(f'{captions} has no column {column!r}; it has {", ".join(reader.fieldnames or ())}')
        for row in reader:
            texts.setdefault(row[image_column], []).append(row[caption_column])
    if not texts:
        raise ConfigError(f'{captions} has no rows')
    common = min(map(len, texts.values()))

    def samples() -> Iterator[Sample]:
        for name, lines in texts.items():
            path = Path(images, name)
            if path.is_file():
                yield Sample(name, {str(i): line for i, line in enumerate(lines[:common])}, path.read_bytes())
            else:
                dropped.add('missing image file', name)

    return {split: samples()}, dropped
