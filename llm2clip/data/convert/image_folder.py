# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A folder of images and a file of captions."""

from collections.abc import Iterator
from pathlib import Path

from llm2clip.data.convert.caption_csv import read_caption_csv
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits

__all__ = ['image_folder']


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption', split: str = 'train'
) -> tuple[Splits, Dropped]:
    """One split of images with their captions, called ``0``, ``1``, … in the order of the file.

    Every image gets as many captions as the image that has fewest.

    Args:
        images: Folder of the images.
        captions: CSV or TSV file with a header, JSON list or JSON lines; one caption a row.
        image_column: Column with the image's path inside `images`.
        caption_column: Column with the text.
        split: Name of the split.
    """
    texts = read_caption_csv(captions, image_column, caption_column)

    def samples(dropped: Dropped) -> Iterator[Sample]:
        for name, lines in texts.items():
            path = Path(images, name)
            if path.is_file():
                yield Sample(name, lines, path.read_bytes())
            else:
                dropped.add('missing image file', name)

    return {split: [Part('all', samples)]}, Dropped()
