# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A file of captions, several of each image: what stage 1 needs of an image dataset."""

from llm2clip.data.caption_files import read_captions
from llm2clip.data.convert.samples import Dropped, Sample, Splits, hold_out, one_part

__all__ = ['caption_csv', 'read_caption_csv']


def read_caption_csv(captions: str, image_column: str, caption_column: str) -> dict[str, dict[str, str]]:
    """Image -> its captions, called ``0``, ``1``, … in the order of the file (see `read_captions`).

    There are as many keys as the image with the most captions has; those that another image lacks are empty.
    """
    texts = read_captions(captions, image_column, caption_column)
    keys = range(max(map(len, texts.values())))
    return {image: {str(i): lines[i] if i < len(lines) else '' for i in keys} for image, lines in texts.items()}


def caption_csv(
    captions: str, image_column: str = 'image', caption_column: str = 'caption', heldout: float = 0, seed: int = 0
) -> tuple[Splits, Dropped]:
    """``train`` and, if asked for, ``heldout`` splits of captions without their images.

    Args:
        captions: CSV or TSV file with a header, JSON list or JSON lines; one caption per row.
        image_column: Column that says which captions belong together.
        caption_column: Column with the text.
        heldout: Images held out, or a share between 0 and 1 of them, chosen by the hash of their name.
        seed: Which ones.
    """
    texts = read_caption_csv(captions, image_column, caption_column)
    splits = hold_out(texts, heldout, seed)
    return {split: one_part([Sample(image, texts[image]) for image in images])
            for split, images in splits.items()}, Dropped()
