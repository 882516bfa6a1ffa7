# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr8k, Flickr30k, COCO and their Chinese captions, in the files in which they are published.

The caption keys are ``0``, ``1``, … in the order of the file.  Their number is the largest number of captions
of an image; the missing captions of other images are empty.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from llm2clip.config.ranges import FolderName, Holdout, Seed, Text, Texts
from llm2clip.data.caption_files import QUOTES, read_csv, read_lines
from llm2clip.data.convert.image_folder import image_splits, numbered_captions
from llm2clip.data.convert.samples import Dropped, Part, split_holdout
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import read_json, reading

# Path of each image, relative to the folder of images, with its captions.
_Images = list[tuple[str, list[str]]]
# The key None stands for images in no split.
_Splits = dict[Optional[str], _Images]

# Split in the name of a file without splits, such as `captions_val2017.json`.
_SPLIT = re.compile(r'(?<![a-z])(train|val|test)(?![a-z])')
# Flickr8k's official lists; Karpathy and Fei-Fei call the `dev` images `val`.
_LISTS = {'train': 'Flickr_8k.trainImages.txt', 'val': 'Flickr_8k.devImages.txt',
          'test': 'Flickr_8k.testImages.txt'}
_COCO_CN = 'imageid.human-written-caption.txt'
# `1000092795.jpg#0<tab>A caption`, `1009692167#zhm#1 <caption>`, `6228559981<tab><caption>`
_NUMBERED = re.compile(r'(?P<image>[^#\s,]+)(?:#\S*)?\s+(?P<caption>.+)')
# `1007129816.jpg,A caption`
_COMMA = re.compile(r'(?P<image>[^\s,]+\.jpg),(?P<caption>.*)')


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
    by_split = read_splits(annotations)
    if split_files is None and split is None and annotations.endswith('.token.txt'):
        split_files = {name: str(Path(annotations).with_name(file)) for name, file in _LISTS.items()}
        if not all(map(os.path.isfile, split_files.values())):
            raise ConfigError(
                f'the lists Flickr_8k.{{train,dev,test}}Images.txt are not beside {annotations}, and without '
                'them images for testing would be trained on; source.split or an empty source.split_files '
                'takes them all', 'source.split_files')
    files = [annotations]
    if split_files:
        unlisted = dict(by_split.get(None, []))
        by_split = {}
        for name, file in split_files.items():
            files.append(file)
            by_split[name] = []
            for where, image in read_lines(file):
                if image not in unlisted:
                    raise FileError(f'image {image[:60]} is listed twice, or has no captions in '
                                    f'{annotations}', where)
                by_split[name].append((image, unlisted.pop(image)))
        by_split[None] = list(unlisted.items())
    return _selected_splits(images, files, by_split, splits, split, holdout, seed)


def flickr30k(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None,
    split: Optional[FolderName] = None, holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Flickr30k: 31,014 images in Karpathy's splits, or 31,783 without splits, with 5 captions each.

    Args:
        images: Folder of the images (``flickr30k-images``), or the folder that paths in `annotations` are
            relative to; null for captions alone.
        annotations: ``dataset_flickr30k.json`` of Karpathy and Fei-Fei, or ``flickr_annotations_30k.csv`` of
            nlphuji/flickr30k; or a file without splits: ``flickr30k_{train,val,test}.json`` of ALBEF and
            BLIP, ``flickr30k_test_karpathy.txt`` of CLIP_benchmark, or ``results_20130124.token``.
        splits, split, holdout, seed: As for `flickr8k`.
    """
    return _selected_splits(images, [annotations], read_splits(annotations), splits, split, holdout, seed)


def coco(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None,
    split: Optional[FolderName] = None, holdout: Holdout = 0, seed: Seed = 0,
) -> tuple[dict[str, list[Part]], Dropped]:
    """COCO: 123,287 images with all of their 5 to 7 captions.

    Args:
        images: Folder with ``train2014/`` and ``val2014/`` for Karpathy's and BLIP's files.  For files in
            COCO's own format, such as ``captions_train2017.json``, the folder with the images
            (``train2017``).  Null for captions alone.
        annotations: ``dataset_coco.json`` of Karpathy and Fei-Fei; or a file without splits: COCO's own,
            ``coco_test_karpathy.json`` of CLIP_benchmark, or ``coco_karpathy_{train,val,test}.json`` of BLIP.
            Karpathy's split ``restval``, the 30,504 images of val2014 outside of ``val`` and ``test``, is
            added to ``train``, as is usual.
        splits: Published splits to write; by default all.
        split, holdout, seed: As for `flickr8k`.
    """
    by_split = read_splits(annotations)
    if 'restval' in by_split:
        by_split.setdefault('train', []).extend(by_split.pop('restval'))
    return _selected_splits(images, [annotations], by_split, splits, split, holdout, seed)


def flickr_cn(images: Optional[str], annotations: str) -> tuple[dict[str, list[Part]], Dropped]:
    """Flickr30k-CN (Lan et al., ACM MM 2017): Flickr30k's 1,000 test images with 5 translations each.

    Args:
        images: Folder of Flickr30k's images; null for captions alone.
        annotations: ``flickr30k_cn_test.txt`` of Flickr30k-CNA, or ``flickr30k_test_zh.txt`` of
            CLIP_benchmark, with the same translations.
    """
    return published_splits(images, [annotations], {'test': captions_of_lines(annotations)})


def coco_cn(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None
) -> tuple[dict[str, list[Part]], Dropped]:
    """COCO-CN (arXiv 1805.08661): COCO images with captions written in Chinese, 1,000 of them in ``test``.

    Args:
        images: Folder that contains COCO's ``train2014/`` and ``val2014/``; null for captions alone.
        annotations: Folder ``coco-cn-version1805v1.1`` with ``imageid.human-written-caption.txt`` and
            ``coco-cn_{train,val,test}.txt``.
        splits: Published splits to write; by default all.
    """
    files = [f'{annotations}/{_COCO_CN}']
    all_captions = dict(captions_of_lines(files[0]))
    by_split: _Splits = {}
    for split in ('train', 'val', 'test'):
        file = f'{annotations}/coco-cn_{split}.txt'
        if not Path(file).is_file():
            continue
        files.append(file)
        by_split[split] = []
        for where, image in read_lines(file):
            with reading(where, 'an image such as COCO_val2014_000000043734'):
                _, folder, _ = image.split('_')
            by_split[split].append((f'{folder}/{image}.jpg', all_captions.get(f'{image}.jpg', [])))
    return published_splits(images, files, by_split, splits)


def _selected_splits(
    images: Optional[str], files: Sequence[str], by_split: _Splits, splits: Optional[Sequence[str]],
    split: Optional[str], holdout: Holdout, seed: int,
) -> tuple[dict[str, list[Part]], Dropped]:
    """Published splits; or for a file without splits, one called `split`, and held-out ones."""
    if by_split.keys() != {None}:
        if split is not None or holdout:
            key = 'source.holdout' if split is None else 'source.split'
            raise ConfigError(f'{files[0]} has splits, which source.splits selects', key)
        return published_splits(images, files, by_split, splits)
    if splits is not None:
        raise ConfigError(f'{files[0]} has no splits; source.split names the one to write', 'source.splits')
    captions: dict[str, list[str]] = {}
    _add_captions(captions, by_split[None], files[0])
    if split is None:
        in_file_name = _SPLIT.search(Path(files[0]).name.lower())
        split = in_file_name[0] if in_file_name else 'train'
    names = split_holdout(captions, holdout, seed, split)
    return image_splits(images, files, numbered_captions(captions), names), Dropped()


def published_splits(
    images: Optional[str], files: Sequence[str], by_split: _Splits, splits: Optional[Sequence[str]] = None
) -> tuple[dict[str, list[Part]], Dropped]:
    """Return the parts of published splits, and the images in no split, which are left out.

    Args:
        images, files: As for `image_splits`.
        by_split: Split -> images with their captions; None -> images in no split.
        splits: Splits to write; by default all.

    Raises:
        ConfigError: A split or the folder does not exist.
        FileError: An image occurs twice.
    """
    published: dict[Any, _Images] = dict(by_split)
    in_no_split = published.pop(None, [])
    captions: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for split in splits or published:
        if split not in published:
            raise ConfigError(f'there is no {split!r} in {files[0]}; it has {", ".join(sorted(published))}',
                              'source.splits')
        names[split] = _add_captions(captions, published[split], files[0])
    dropped = Dropped()
    for image, _ in in_no_split:
        dropped.add('in no split', image)
    return image_splits(images, files, numbered_captions(captions), names), dropped


def _add_captions(captions: dict[str, list[str]], images: _Images, file: str) -> list[str]:
    """Add images with their captions, except blank ones, to `captions`, and return their names."""
    for image, lines in images:
        if image in captions:
            raise FileError(f'image {image} occurs twice', file)
        with reading(file, f'captions of {image} that are texts'):
            captions[image] = list(filter(str.strip, lines))
    return [image for image, _ in images]


# ------------------------------------------------------------------------------------------------- Formats


def read_splits(path: str) -> _Splits:
    """Return split -> images with their captions; all images of a file without splits have the key None.

    Raises:
        FileError: The file cannot be read, or has none of the published formats.
    """
    if not path.endswith(('.csv', '.json')):
        return {None: captions_of_lines(path)}
    splits: _Splits = {}
    with reading(path, 'images with captions in one of the formats that the documentation names'):
        if path.endswith('.csv'):  # of nlphuji/flickr30k, with the captions as a JSON list in one cell
            for _, row in read_csv(path)[1]:
                splits.setdefault(row['split'], []).append((row['filename'], json.loads(row['raw'])))
            return splits
        content = read_json(path)
        captions: defaultdict[Any, list[str]] = defaultdict(list)
        if isinstance(content, list):  # of ALBEF and BLIP, with a record per caption or per image
            for record in content:
                texts = record['caption']
                if isinstance(texts, str):
                    texts = [texts]
                captions[record['image']].extend(texts)
            return {None: list(captions.items())}
        if 'annotations' in content:  # COCO's own; some images have no caption
            for annotation in content['annotations']:
                captions[annotation['image_id']].append(annotation['caption'])
            return {None: [(image['file_name'], captions[image['id']]) for image in content['images']]}
        for image in content['images']:  # of Karpathy and Fei-Fei
            name = os.path.join(image.get('filepath', ''), image['filename'])
            texts = [sentence['raw'] for sentence in image['sentences']]
            splits.setdefault(image['split'], []).append((name, texts))
    return splits


def captions_of_lines(path: str) -> _Images:
    """Read the captions of each image file from a file with one caption per line.

    Lines are ``<image>#<number><tab or space><caption>``, where the number and ``.jpg`` may be missing, or
    ``<image>.jpg,<caption>``, usually after a header.

    Raises:
        FileError: A line has neither form, or a quote is not closed; the message names file and line.
    """
    lines = list(read_lines(path))
    has_commas = len(lines) > 1 and _COMMA.fullmatch(lines[1][1]) is not None
    read = _comma_captions if has_commas else _numbered_captions
    captions: dict[str, list[str]] = {}
    for image, caption in read(lines):
        if '.' not in image:
            image += '.jpg'
        captions.setdefault(image, []).append(caption)
    return list(captions.items())


def _numbered_captions(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Image and caption of each line."""
    for where, line in lines:
        yield _parts(_NUMBERED, line, where)


def _comma_captions(lines: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Image and caption of each line.  Kaggle's files quote captions with commas, CLIP_benchmark's do not."""
    if not _COMMA.fullmatch(lines[0][1]):
        lines = lines[1:]  # without the header
    rows = [(where, *_parts(_COMMA, line, where)) for where, line in lines]
    is_quoted = not any(',' in caption and caption[0] != '"' for _, _, caption in rows)
    for where, image, caption in rows:
        if is_quoted and caption:
            with reading(where, QUOTES):
                (caption,) = next(csv.reader([caption], strict=True))
        yield image, caption


def _parts(form: re.Pattern[str], line: str, where: str) -> tuple[str, str]:
    """Image and caption of a line."""
    match = form.fullmatch(line)
    if match is None:
        raise FileError('expected `<image>#<number><tab><caption>` or `<image>.jpg,<caption>`, found '
                        f'{line[:60]!r}', where)
    return match['image'], match['caption']
