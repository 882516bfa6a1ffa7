# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A file of captions, several of each image: what stage 1 needs of an image dataset."""

import random

from llm2clip.data.caption_files import read_captions
from llm2clip.data.convert.samples import Dropped, Sample, Splits, one_part

__all__ = ['caption_csv', 'read_caption_csv']


def read_caption_csv(captions: str, image_column: str, caption_column: str) -> dict[str, dict[str, str]]:
    """Image -> its captions, called ``0``, ``1``, … in the order of the file (see `read_captions`).

    Every image gets as many captions as the image that has fewest.
    """
    texts = read_captions(captions, image_column, caption_column)
    common = min(map(len, texts.values()))
    return {image: {str(i): line for i, line in enumerate(lines[:common])} for image, lines in texts.items()}


def caption_csv(
    captions: str, image_column: str = 'image', caption_column: str = 'caption', heldout: int = 0, seed: int = 0
) -> tuple[Splits, Dropped]:
    """``train`` and, if asked for, ``heldout`` splits of captions without their images.

    Args:
        captions: CSV or TSV file with a header, JSON list or JSON lines; one caption a row.
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
