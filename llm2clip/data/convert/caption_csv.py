# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A CSV file of captions, several of each image: what stage 1 needs of an image dataset."""

import csv
import random
from pathlib import Path

from llm2clip.config import ConfigError
from llm2clip.data.convert.samples import Dropped, Sample, Splits, one_part

__all__ = ['caption_csv', 'read_caption_csv']


def read_caption_csv(captions: str, image_column: str, caption_column: str) -> dict[str, dict[str, str]]:
    """Image -> its captions, called ``0``, ``1``, … in the order of the file.

    Every image gets as many captions as the image that has fewest.

    Raises:
        ConfigError: The file is missing or empty, or lacks a column.
    """
    if not Path(captions).is_file():
        raise ConfigError(f'source.captions: there is no file {captions}')
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
    return {image: {str(i): line for i, line in enumerate(lines[:common])} for image, lines in texts.items()}


def caption_csv(
    captions: str, image_column: str = 'image', caption_column: str = 'caption', heldout: int = 0, seed: int = 0
) -> tuple[Splits, Dropped]:
    """``train`` and, if asked for, ``heldout`` splits of captions without their images.

    Args:
        captions: CSV file with a header, one caption a row.
        image_column: Column that says which captions belong together.
        caption_column: Column with the text.
        heldout: Images held out.
        seed: Which ones.
    """
    texts = read_caption_csv(captions, image_column, caption_column)
    samples = [Sample(image, lines) for image, lines in texts.items()]
    if not heldout:
        return {'train': one_part(samples)}, Dropped()
    random.Random(seed).shuffle(samples)
    return {'train': one_part(samples[heldout:]), 'heldout': one_part(samples[:heldout])}, Dropped()
