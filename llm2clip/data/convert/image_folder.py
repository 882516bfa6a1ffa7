# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sources with a caption file and, except for stage 1, a folder of images: custom data, Flickr and COCO.

The caption keys are ``0``, ``1``, … in the order of the file.  Their number is the largest number of captions
of an image; the missing captions of other images are empty.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Optional

from llm2clip.config.ranges import FolderName, Holdout, Seed, Text, Texts
from llm2clip.data.caption_files import check_image_paths, official_lists, read_captions, read_splits
from llm2clip.data.convert.samples import Dropped, Part, Sample, check_folder, read_image, split_holdout
from llm2clip.errors import ConfigError, FileError

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
        image_column: Column with the image's path relative to `images`; outside paths are refused.
        caption_column: Column with the text.
        split: Name of the split.
        holdout, seed: Share between 0 and 1, or number, of the images in the split ``val``, chosen by the
            hash of their path.  A mapping split -> number of images makes several splits, such as ``val`` and
            ``test``.
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
    split_files: Optional[dict[FolderName, Text]] = None, split: Optional[FolderName] = None,
    holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Flickr8k: 8,000 images with 5 captions each; 91 more images are in no split and are left out.

    Args:
        images: Folder of the images, such as ``Flicker8k_Dataset``; null for captions alone.
        annotations: ``Flickr8k.token.txt``, ``dataset_flickr8k.json`` of Karpathy and Fei-Fei, or
            ``captions.txt`` of Kaggle.
        splits: Published splits to write; by default all: ``train``, ``val`` and ``test``.
        split_files: For a file without splits: split -> file with one image per line.  Default: the official
            lists ``Flickr_8k.{train,dev,test}Images.txt`` beside ``Flickr8k.token.txt``; ``dev`` becomes
            ``val``.
        split: For a dataset without splits: name of the split to write.  Default: ``train``, ``val`` or
            ``test`` if the file name contains it, else ``train``.
        holdout, seed: For a dataset without splits, as for `image_folder`.
    """
    if split_files is None:
        split_files = official_lists(annotations)
        is_token_file = annotations.endswith('.token.txt') and Path(annotations).is_file()
        if is_token_file and not split_files and split is None:
            raise ConfigError('source.split_files: the lists Flickr_8k.{train,dev,test}Images.txt are not beside '
                              f'{annotations}, and without them images for testing would be trained on; '
                              'source.split or an empty source.split_files takes them all')
    return _published(images, annotations, splits, split, holdout, seed, split_files)


def flickr30k(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None,
    split: Optional[FolderName] = None, holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Flickr30k: 31,014 images in Karpathy's splits, or 31,783 without splits, with 5 captions each.

    Args:
        images: Folder of the images (``flickr30k-images``), or the folder that paths in `annotations` are
            relative to; null for captions alone.
        annotations: ``dataset_flickr30k.json`` of Karpathy and Fei-Fei, or ``flickr_annotations_30k.csv`` of
            nlphuji/flickr30k; or a file without splits: ``flickr30k_train.json`` of BLIP or
            ``results_20130124.token``.
        splits, split, holdout, seed: As for `flickr8k`.
    """
    return _published(images, annotations, splits, split, holdout, seed)


def coco(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None,
    split: Optional[FolderName] = None, holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """COCO: 123,287 images with all of their 5 to 7 captions.

    Args:
        images: Folder with ``train2014/`` and ``val2014/`` for Karpathy's and BLIP's files.  For COCO's own
            files, such as ``captions_train2017.json``, the folder with the images (``train2017``).  Null for
            captions alone.
        annotations: ``dataset_coco.json`` of Karpathy and Fei-Fei; or a file without splits: COCO's own, or
            ``coco_karpathy_train.json`` of BLIP.  Karpathy's split ``restval``, the 30,504 images of val2014
            outside of ``val`` and ``test``, is added to ``train``, as is usual.
        splits: Published splits to write; by default all.
        split, holdout, seed: As for `flickr8k`.
    """
    return _published(images, annotations, splits, split, holdout, seed, added_to={'restval': 'train'})


def _published(
    images: Optional[str], annotations: str, splits: Optional[list[str]], split: Optional[str], holdout: Holdout,
    seed: int, split_files: Optional[Mapping[str, str]] = None, added_to: Optional[Mapping[str, str]] = None,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Splits of a published dataset; `added_to` maps a split to the split that its images are added to."""
    if images is not None:
        check_folder(images)
    if not Path(annotations).is_file():
        raise ConfigError(f'source.annotations: there is no file {Path(annotations).absolute()}')
    split_files = split_files or {}
    by_split = read_splits(annotations, split_files)
    for name, target in (added_to or {}).items():
        if name in by_split:
            by_split[target] = [*by_split.get(target, ()), *by_split.pop(name)]
    published = [name for name in by_split if name is not None]
    without_split = by_split.get(None, ())
    captions: dict[str, list[str]] = {}
    split_images: dict[str, list[str]] = {}
    for name in _chosen_splits(annotations, published, splits, split, holdout):
        split_images[name] = _add_captions(captions, by_split[name], annotations)
    if not published:
        _add_captions(captions, without_split, annotations)
    if not any(captions.values()):
        raise ConfigError(f'{annotations} has no {"captions" if captions else "images"}')
    dropped = Dropped()
    if published:
        for image, _ in without_split:
            dropped.add('in no split', image)
    else:
        if split is None:
            in_file_name = _SPLIT.search(Path(annotations).name.lower())
            split = in_file_name[0] if in_file_name else 'train'
        split_images = split_holdout(captions, holdout, seed, split)
    parts: dict[str, dict[str, list[str]]] = {}
    for name, names in split_images.items():
        parts[name] = {f'{start:08}': names[start:start + _IMAGES] for start in range(0, len(names), _IMAGES)}
    return _splits(images, annotations, captions, parts, split_files.values()), dropped


def _chosen_splits(
    annotations: str, published: list[str], splits: Optional[list[str]], split: Optional[str], holdout: Holdout
) -> list[str]:
    """Names of the published splits to write; a ConfigError if the options do not fit the dataset."""
    names = ', '.join(sorted(published))
    if published and (split is not None or holdout):
        key = 'holdout' if split is None else 'split'
        raise ConfigError(f'source.{key}: {annotations} has the splits {names}; source.splits says which of '
                          'them are written')
    if splits is not None and not published:
        raise ConfigError(f'source.splits: {annotations} has no splits; source.split names the one that is '
                          'written')
    for name in splits or ():
        if name not in published:
            raise ConfigError(f'source.splits: there is no {name!r} in {annotations}; it has {names}')
    return splits or published


def _add_captions(
    captions: dict[str, list[str]], images: Iterable[tuple[str, list[str]]], annotations: str
) -> list[str]:
    """Add images with their captions, except blank ones, to `captions`, and return their names."""
    names: list[str] = []
    for image, lines in images:
        if image in captions:
            raise FileError(f'{annotations}: image {image} occurs twice')
        captions[image] = [line for line in lines if line.strip()]
        names.append(image)
    return names


def _splits(
    images: Optional[str], file: str, captions: Mapping[str, list[str]],
    parts: Mapping[str, Mapping[str, list[str]]], lists: Iterable[str] = (),
) -> dict[str, list[Part]]:
    """Splits with `parts` (split -> part -> images), read from the caption `file` and `lists` of images."""
    num_captions = max(map(len, captions.values()))

    def samples(names: list[str], dropped: Dropped) -> Iterator[Sample]:
        for name in names:
            image = None
            if images is not None:
                image = read_image([images], name, file, dropped)
                if image is None:
                    continue
            texts = captions[name] + [''] * (num_captions - len(captions[name]))
            yield Sample(name, {str(i): text for i, text in enumerate(texts)}, image)

    splits: dict[str, list[Part]] = {}
    for split, names_by_part in parts.items():
        splits[split] = [
            Part(part, partial(samples, names), [file, *lists]) for part, names in names_by_part.items()]
    return splits
