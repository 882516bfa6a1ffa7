# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sources with a caption file and, except for stage 1, a folder of images: custom data, Flickr8k, Flickr30k and COCO.

The caption keys are ``0``, ``1``, … in the order of the file.  Their number is the largest number of captions of an
image; the missing captions of other images are empty.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Optional

from llm2clip.config import ConfigError
from llm2clip.config.ranges import FolderName, Holdout, Seed, Text, Texts
from llm2clip.data.caption_files import check_image_paths, official_lists, read_captions, read_splits
from llm2clip.data.convert.samples import Dropped, Part, Sample, check_folder, read_image, split_holdout
from llm2clip.files import FileError

# Images per part of a published dataset.
_IMAGES = 10_000
# Split in the name of a file without splits, such as `captions_val2017.json`.
_SPLIT = re.compile(r'(?<![a-z])(train|val|test)(?![a-z])')


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption',
    split: FolderName = 'train', holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Folder of images, with a file of their captions.

    Args:
        images: Folder of the images.
        captions: CSV or TSV file with a header, JSON list or JSON lines; one caption per row.
        image_column: Column with the image's path relative to `images`; paths outside of the folder are refused.
        caption_column: Column with the text.
        split: Name of the split.
        holdout, seed: Share between 0 and 1, or number, of the images in the split ``val``, chosen by the hash of their
            path.  A mapping split -> number of images makes several splits, such as ``val`` and ``test``.
    """
    check_folder(images)
    texts = read_captions(captions, image_column, caption_column)
    check_image_paths(texts, images, captions)
    parts = {name: {'all': names} for name, names in split_holdout(texts, holdout, seed, split).items()}
    return _splits(images, captions, texts, parts), Dropped()


def caption_csv(
    captions: str, image_column: str = 'image', caption_column: str = 'caption', holdout: Holdout = 0, seed: Seed = 0
) -> tuple[dict[str, list[Part]], Dropped]:
    """Captions without images, grouped by the value of `image_column`.  Arguments as for `image_folder`."""
    texts = read_captions(captions, image_column, caption_column)
    parts = {name: {'all': names} for name, names in split_holdout(texts, holdout, seed).items()}
    return _splits(None, captions, texts, parts), Dropped()


def flickr8k(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None,
    split_files: Optional[dict[FolderName, Text]] = None, split: Optional[FolderName] = None, holdout: Holdout = 0,
    seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Flickr8k: 8,000 images with 5 captions each; 91 more images are in no split and are left out.

    Args:
        images: Folder of the images, such as ``Flicker8k_Dataset``; null for captions alone.
        annotations: ``Flickr8k.token.txt``, ``dataset_flickr8k.json`` of Karpathy and Fei-Fei, or ``captions.txt`` of
            Kaggle.
        splits: Published splits to write; by default all: ``train``, ``val`` and ``test``.
        split_files: For a file without splits: split -> file with one image per line.  Default: the official lists
            ``Flickr_8k.{train,dev,test}Images.txt`` beside ``Flickr8k.token.txt``; ``dev`` becomes ``val``.
        split: For a dataset without splits: name of the split to write.  Default: ``train``, ``val`` or ``test`` if the
            file name contains it, else ``train``.
        holdout, seed: For a dataset without splits, as for `image_folder`.
    """
    if split_files is None:
        split_files = official_lists(annotations)
        if not split_files and Path(annotations).is_file() and annotations.endswith('.token.txt') and split is None:
            raise ConfigError(f'source.split_files: the lists Flickr_8k.{{train,dev,test}}Images.txt are not beside '
                              f'{annotations}, and without them images for testing would be trained on; source.split '
                              'or an empty source.split_files takes them all')
    return _published(images, annotations, splits, split, holdout, seed, split_files)


def flickr30k(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None, split: Optional[FolderName] = None,
    holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Flickr30k: 31,014 images in Karpathy's splits, or 31,783 without splits, with 5 captions each.

    Args:
        images: Folder of the images (``flickr30k-images``), or the folder that paths in `annotations` are relative to;
            null for captions alone.
        annotations: ``dataset_flickr30k.json`` of Karpathy and Fei-Fei, or ``flickr_annotations_30k.csv`` of
            nlphuji/flickr30k; or a file without splits: ``flickr30k_train.json`` of BLIP or ``results_20130124.token``.
        splits, split, holdout, seed: As for `flickr8k`.
    """
    return _published(images, annotations, splits, split, holdout, seed)


def coco(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None, split: Optional[FolderName] = None,
    holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """COCO: 123,287 images with all of their 5 to 7 captions.

    Args:
        images: Folder with ``train2014/`` and ``val2014/`` for Karpathy's and BLIP's files.  For COCO's own files, such
            as ``captions_train2017.json``, the folder with the images (``train2017``).  Null for captions alone.
        annotations: ``dataset_coco.json`` of Karpathy and Fei-Fei; or a file without splits: COCO's own, or
            ``coco_karpathy_train.json`` of BLIP.  Karpathy's split ``restval``, the 30,504 images of val2014 outside of
            ``val`` and ``test``, is added to ``train``, as is usual.
        splits: Published splits to write; by default all.
        split, holdout, seed: As for `flickr8k`.
    """
    return _published(images, annotations, splits, split, holdout, seed, part_of={'restval': 'train'})


def _published(
    images: Optional[str], annotations: str, splits: Optional[list[str]], split: Optional[str], holdout: Holdout,
    seed: int, split_files: Optional[Mapping[str, str]] = None, part_of: Optional[Mapping[str, str]] = None,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Splits of a published dataset; `part_of` maps a split to the split that it is added to."""
    if images is not None:
        check_folder(images)
    if not Path(annotations).is_file():
        raise ConfigError(f'source.annotations: there is no file {Path(annotations).absolute()}')
    found = read_splits(annotations, split_files)
    for name, other in (part_of or {}).items():
        if name in found:
            found[other] = [*found.get(other, ()), *found.pop(name)]
    published = [name for name in found if name is not None]
    there = ', '.join(sorted(published))
    if published and (split is not None or holdout):
        raise ConfigError(f'source.{"holdout" if split is None else "split"}: {annotations} has the splits {there}; '
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
            captions[image] = [line for line in lines if line.strip()]
        written[name or ''] = list(captions)[before:]
    if not any(captions.values()):
        raise ConfigError(f'{annotations} has no {"captions" if captions else "images"}')
    dropped = Dropped()
    if published:
        for image, _ in found.get(None, ()):
            dropped.add('in no split', image)
    else:
        said = _SPLIT.search(Path(annotations).name.lower())
        written = split_holdout(captions, holdout, seed, split or (said[0] if said else 'train'))
    parts = {name: {f'{start:08}': names[start:start + _IMAGES] for start in range(0, len(names), _IMAGES)}
             for name, names in written.items()}
    return _splits(images, annotations, captions, parts, (split_files or {}).values()), dropped


def _splits(
    images: Optional[str], file: str, captions: Mapping[str, list[str]], parts: Mapping[str, Mapping[str, list[str]]],
    lists: Iterable[str] = (),
) -> dict[str, list[Part]]:
    """Splits with `parts` (split -> part -> images), which depend on the caption `file` and on `lists` of images."""
    keys = range(max(map(len, captions.values())))

    def samples(names: list[str], dropped: Dropped) -> Iterator[Sample]:
        for name in names:
            image = read_image([images], name, file, dropped) if images is not None else None
            if images is None or image is not None:
                lines = captions[name]
                yield Sample(name, {str(i): lines[i] if i < len(lines) else '' for i in keys}, image)

    return {split: [Part(part, partial(samples, names), [file, *lists]) for part, names in of_split.items()]
            for split, of_split in parts.items()}
