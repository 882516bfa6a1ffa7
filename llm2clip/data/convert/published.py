# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr8k, Flickr30k and COCO for training, in their published files: images with captions, or captions alone."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Optional

from llm2clip.config import ConfigError
from llm2clip.config.ranges import FolderName, HeldOut, Seed, Text, Texts
from llm2clip.data.convert.samples import (
    Dropped,
    Part,
    Sample,
    Splits,
    check_folder,
    hold_out,
    read_image,
)
from llm2clip.data.published_captions import Images, official_lists, read_splits
from llm2clip.files import FileError

__all__ = ['coco', 'flickr30k', 'flickr8k']

# Images of a part.
_IMAGES = 10_000
# Of the name of a file without splits, such as `captions_val2017.json`.
_SPLIT = re.compile(r'(?<![a-z])(train|val|test)(?![a-z])')


def flickr8k(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None,
    split_files: Optional[dict[FolderName, Text]] = None, split: Optional[FolderName] = None, heldout: HeldOut = 0,
    seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """Flickr8k: 8,000 images with 5 captions each, and 91 that are in none of its splits, which are left out.

    Captions are called ``0``, ``1``, …; there are as many keys as the image with the most captions has, and those that
    another image lacks are empty.

    Args:
        images: Folder of the images, such as ``Flicker8k_Dataset``; null for captions alone.
        annotations: ``Flickr8k.token.txt``, ``dataset_flickr8k.json`` of Karpathy and Fei-Fei, or ``captions.txt`` of
            Kaggle.
        splits: Which of the published splits are written; unset, all: ``train``, ``val`` and ``test``.
        split_files: For a file without splits: split -> file with one image per line.  Unset, the official lists
            ``Flickr_8k.{train,dev,test}Images.txt`` beside ``Flickr8k.token.txt``, as far as they are there; the
            images of ``dev`` become ``val``, as Karpathy calls them.
        split: Without any splits, the name of the one that is written; unset, ``train``, or the one of ``train``,
            ``val`` and ``test`` that is in the file's name.
        heldout, seed: Without any splits, as for `image_folder`.

    Raises:
        ConfigError: Folder, file, field or split is missing, an argument does not go with the file, or a split would be
            empty.
        FileError: A file is damaged; an image occurs twice; a list names an image without captions.
    """
    if split_files is None:
        split_files = official_lists(annotations)
        if not split_files and Path(annotations).is_file() and annotations.endswith('.token.txt') and split is None:
            raise ConfigError(f'source.split_files: the lists Flickr_8k.{{train,dev,test}}Images.txt are not beside '
                              f'{annotations}, and without them images for testing would be trained on; source.split '
                              'or an empty source.split_files takes them all')
    found = _read(images, annotations, split_files)
    return _convert(images, annotations, found, splits, split, heldout, seed, split_files.values())


def flickr30k(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None, split: Optional[FolderName] = None,
    heldout: HeldOut = 0, seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """Flickr30k: 31,014 images in Karpathy's splits, or 31,783 without splits, with 5 captions each.

    Args:
        images: Folder of the images, ``flickr30k-images``, or that which the paths in `annotations` start from; null
            for captions alone.
        annotations: ``dataset_flickr30k.json`` of Karpathy and Fei-Fei, ``flickr_annotations_30k.csv`` of
            nlphuji/flickr30k, ``flickr30k_train.json`` of BLIP, or ``results_20130124.token``; the last two have no
            splits.
        splits, split, heldout, seed: As for `flickr8k`, and so are the errors.
    """
    return _convert(images, annotations, _read(images, annotations), splits, split, heldout, seed)


def coco(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None, merge_restval: bool = True,
    split: Optional[FolderName] = None, heldout: HeldOut = 0, seed: Seed = 0,
) -> tuple[Splits, Dropped]:
    """COCO: 123,287 images with 5 to 7 captions each, all of which are kept.

    Args:
        images: Folder of ``train2014/`` and ``val2014/`` for Karpathy's and BLIP's files; for COCO's own, such as
            ``captions_train2017.json``, the folder of the images itself (``train2017``).  Null for captions alone.
        annotations: ``dataset_coco.json`` of Karpathy and Fei-Fei, or a file without splits: COCO's own, or
            ``coco_karpathy_train.json`` of BLIP.
        splits: Which of the published splits are written; unset, all.
        merge_restval: Whether Karpathy's ``restval``, the 30,504 images of val2014 that are neither in ``val`` nor in
            ``test``, is a part of ``train``, as is usual, or a split of its own.
        split, heldout, seed: As for `flickr8k`, and so are the errors.
    """
    found = _read(images, annotations)
    if merge_restval and 'restval' in found:
        if 'restval' in (splits or ()):
            raise ConfigError('source.splits: restval is a part of train; source.merge_restval=false makes it a split '
                              'of its own')
        found['train'] = chain(found.get('train', ()), found.pop('restval'))
    return _convert(images, annotations, found, splits, split, heldout, seed)


def _read(
    images: Optional[str], annotations: str, split_files: Optional[Mapping[str, str]] = None
) -> dict[Optional[str], Images]:
    """`read_splits`, after a check that file and folder are there."""
    if images is not None:
        check_folder(images)
    if not Path(annotations).is_file():
        raise ConfigError(f'source.annotations: there is no file {Path(annotations).absolute()}')
    return read_splits(annotations, split_files)


def _convert(
    images: Optional[str], annotations: str, found: Mapping[Optional[str], Images], splits: Optional[list[str]],
    split: Optional[str], heldout: HeldOut, seed: int, lists: Iterable[str] = (),
) -> tuple[Splits, Dropped]:
    published = [name for name in found if name is not None]
    there = ', '.join(sorted(published))
    if published and (split is not None or heldout):
        raise ConfigError(f'source.{"heldout" if split is None else "split"}: {annotations} has the splits {there}; '
                          'source.splits says which of them are written')
    if splits is not None and not published:
        raise ConfigError(f'source.splits: {annotations} has no splits; source.split names the one that is written')
    for name in splits or ():
        if name not in published:
            raise ConfigError(f'source.splits: there is no {name!r} in {annotations}; it has {there}')
    captions: dict[str, list[str]] = {}
    written: dict[str, list[str]] = {}
    for name in (splits or published) if published else [None]:
        before = len(captions)
        for image, lines in found.get(name, ()):
            if image in captions:
                raise FileError(f'{annotations}: image {image} occurs twice')
            captions[image] = [line.strip() for line in lines if line.strip()]
        written[name or ''] = list(captions)[before:]
    if not any(captions.values()):
        raise ConfigError(f'{annotations} has no {"captions" if captions else "images"}')
    dropped = Dropped()
    if published:
        for image, _ in found.get(None, ()):
            dropped.add('in no split', image)
    else:
        said = _SPLIT.search(Path(annotations).name.lower())
        split = split or (said[0] if said else 'train')
        written = hold_out(captions, heldout, seed, split)
    keys = range(max(map(len, captions.values())))

    def samples(names: list[str], dropped: Dropped) -> Iterator[Sample]:
        for name in names:
            image = read_image(images, name, annotations, dropped) if images is not None else None
            if images is None or image is not None:
                lines = captions[name]
                yield Sample(name, {str(i): lines[i] if i < len(lines) else '' for i in keys}, image)

    return {name: [Part(f'{start:08}', partial(samples, names[start:start + _IMAGES]), [annotations, *lists])
                   for start in range(0, len(names), _IMAGES)] for name, names in written.items()}, dropped
