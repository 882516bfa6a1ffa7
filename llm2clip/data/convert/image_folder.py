# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A file of captions, with a folder of their images or, for stage 1, without."""

from collections.abc import Iterator
from functools import partial

from llm2clip.config.ranges import FolderName, HeldOut, Seed
from llm2clip.data.caption_files import read_captions
from llm2clip.data.convert.samples import (
    Dropped,
    Part,
    Sample,
    Splits,
    check_folder,
    hold_out,
    one_part,
    read_image,
)

__all__ = ['caption_csv', 'image_folder']


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption',
    split: FolderName = 'train', heldout: HeldOut = 0, seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """Images with their captions, called ``0``, ``1``, … in the order of the file.

    There are as many keys as the image with the most captions has; those that another image lacks are empty.

    Args:
        images: Folder of the images.
        captions: CSV or TSV file with a header, JSON list or JSON lines; one caption per row.
        image_column: Column with the image's path inside `images`, which it cannot leave.
        caption_column: Column with the text.
        split: Name of the split.
        heldout: Share between 0 and 1 of the images that go into the split ``heldout``, or how many, chosen by the hash
            of their path; or the names of several splits, such as ``val`` and ``test``, each with its number of images.
            With more images in `captions`, a share moves none of the others into another split.
        seed: Which ones.

    Raises:
        ConfigError: Folder, file or column is missing, or one of the two splits would be empty.
    """
    check_folder(images)
    texts = _texts(captions, image_column, caption_column)
    splits = hold_out(texts, heldout, seed, split)

    def samples(names: list[str], dropped: Dropped) -> Iterator[Sample]:
        for name in names:
            if (image := read_image(images, name, captions, dropped)) is not None:
                yield Sample(name, texts[name], image)

    return {name: [Part('all', partial(samples, names), [captions])]
            for name, names in splits.items()}, Dropped()


def caption_csv(
    captions: str, image_column: str = 'image', caption_column: str = 'caption', heldout: HeldOut = 0, seed: Seed = 0
) -> tuple[Splits, Dropped]:
    """Captions without their images; arguments as for `image_folder`, whose `image_column` says which belong together.
    """
    texts = _texts(captions, image_column, caption_column)
    return {split: one_part([Sample(image, texts[image]) for image in images], captions)
            for split, images in hold_out(texts, heldout, seed).items()}, Dropped()


def _texts(captions: str, image_column: str, caption_column: str) -> dict[str, dict[str, str]]:
    """Image -> its captions by their keys."""
    texts = read_captions(captions, image_column, caption_column)
    keys = range(max(map(len, texts.values())))
    return {image: {str(i): lines[i] if i < len(lines) else '' for i in keys} for image, lines in texts.items()}
