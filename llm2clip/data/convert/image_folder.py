# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folder of images with a caption file, and the splits of every source that has its captions in memory."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Optional

from llm2clip.config.ranges import FolderName, Holdout, Seed
from llm2clip.data.caption_files import read_captions
from llm2clip.data.convert.samples import Dropped, Part, Sample, check_folder, read_image, split_holdout

_IMAGES_PER_PART = 10_000


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption',
    split: FolderName = 'train', holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Folder of images, with a file of their captions.

    The caption keys are ``0``, ``1``, … in the order of the file.  Their number is the largest number of
    captions of an image; the missing captions of other images are empty.

    Args:
        images: Folder of the images.
        captions: CSV or TSV file with a header, JSON list or JSON lines; one caption per row.
        image_column: Column with the image's path relative to `images`; outside paths are refused.
        caption_column: Column with the text.
        split: Name of the split.
        holdout, seed: Share between 0 and 1, or number, of the images in the split ``val``, chosen by the
            hash of their path.  A mapping split -> number of images makes several splits, such as ``val`` and
            ``test``.
    """
    return _numbered_splits(images, captions, image_column, caption_column, holdout, seed, split)


def caption_csv(
    captions: str, image_column: str = 'image', caption_column: str = 'caption', holdout: Holdout = 0,
    seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Captions without images, grouped by the value of `image_column`.  Arguments as for `image_folder`."""
    return _numbered_splits(None, captions, image_column, caption_column, holdout, seed, 'train')


def _numbered_splits(
    images: Optional[str], captions: str, image_column: str, caption_column: str, holdout: Holdout, seed: int,
    split: str,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Splits of a caption file.  A part without samples counts the rows that name no image."""
    texts, without_image = read_captions(captions, image_column, caption_column)
    splits = split_holdout(texts, holdout, seed, split)
    parts = image_splits(images, [captions], numbered_captions(texts), splits)

    def no_samples(dropped: Dropped) -> Sequence[Sample]:
        dropped.add('no image', *without_image)
        return []

    if without_image:
        parts[split].append(Part('without-image', no_samples, [captions]))
    return parts, Dropped()


def numbered_captions(captions: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Return image -> caption key -> caption, with the keys ``0``, ``1``, …, from image -> captions."""
    return {image: {str(i): text for i, text in enumerate(texts)} for image, texts in captions.items()}


def image_splits(
    images: Optional[str], files: Sequence[str], captions: Mapping[str, Mapping[str, str]],
    splits: Mapping[str, Sequence[str]],
) -> dict[str, list[Part]]:
    """Return the parts of each split, of 10,000 images each.

    Args:
        images: Folder of the images; None for captions alone.
        files: Input files of the captions.
        captions: Image, by its path inside the folder -> caption key -> caption.  Missing ones become empty.
        splits: Split -> its images.

    Raises:
        ConfigError: The folder does not exist.
    """
    if images is not None:
        check_folder(images)
    keys = list(dict.fromkeys(itertools.chain.from_iterable(captions.values())))

    def samples(names: Sequence[str], dropped: Dropped) -> Iterator[Sample]:
        for name in names:
            image = None
            if images is not None:
                image = read_image([images], name, files[0], dropped)
                if image is None:
                    continue
            yield Sample(name, {key: captions[name].get(key, '') for key in keys}, image)

    parts: dict[str, list[Part]] = {}
    for split, names in splits.items():
        parts[split] = [Part(f'{i:08}', partial(samples, names[i:i + _IMAGES_PER_PART]), files)
                        for i in range(0, len(names), _IMAGES_PER_PART)]
    return parts
