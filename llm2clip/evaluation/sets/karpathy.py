# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr8k, Flickr30k and COCO, whose test sets are those of Karpathy and Fei-Fei (arXiv 1412.2306)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Count, Text
from llm2clip.data.published_captions import Images, official_lists, read_splits
from llm2clip.evaluation.sets.files import RetrievalSet, check_file, check_has_split, retrieval_set

__all__ = ['coco', 'flickr30k', 'flickr8k']


def flickr8k(
    images: str, annotations: str, split: str = 'test', split_files: Optional[dict[Text, Text]] = None
) -> RetrievalSet:
    """Flickr8k: 1,000 images with 5 captions each (test).

    The 8,091 images (for research and teaching only) are in
    https://github.com/jbrownlee/Datasets/releases/tag/Flickr8k (``Flickr8k_Dataset.zip``, ``Flickr8k_text.zip``) and in
    https://www.kaggle.com/datasets/adityajn105/flickr8k .

    Args:
        images: Folder of the images, ``Flicker8k_Dataset`` or Kaggle's ``Images``.
        annotations: One of

            - ``Flickr8k.token.txt``, with the lists of its splits,
            - ``dataset_flickr8k.json`` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip),
            - ``captions.txt`` of Kaggle, which needs `split_files`.
        split: ``train``, ``val`` (officially ``dev``) or ``test``.  A file without splits and lists must have the
            split's name in its own, or be taken whole with ``all``.
        split_files: For a file without splits: split -> file with one image per line.  Unset, the official lists
            ``Flickr_8k.{train,dev,test}Images.txt`` beside ``Flickr8k.token.txt``.
    """
    check_file('flickr8k', 'annotations', annotations)
    splits = read_splits(annotations, official_lists(annotations) if split_files is None else split_files)
    found = _of_split('flickr8k', annotations, split, splits, ', and split_files: {test: <file>} lists its images')
    return retrieval_set('flickr8k', found, annotations, images)


def flickr30k(images: str, annotations: str, split: str = 'test') -> RetrievalSet:
    """Flickr30k: 1,000 images with 5 captions each (test).

    The 31,783 images (``flickr30k-images/<number>.jpg``, for research only) are given out on request at
    https://shannon.cs.illinois.edu/DenotationGraph/ and are in https://huggingface.co/datasets/nlphuji/flickr30k .

    Args:
        images: Folder of the images, or that which the paths in `annotations` start from.
        annotations: One of

            - ``dataset_flickr30k.json`` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip),
            - ``flickr_annotations_30k.csv`` (nlphuji/flickr30k),
            - ``flickr30k_test.json`` as ALBEF, BLIP and LLM2CLIP use it, with images ``flickr30k-images/<number>.jpg``
              (https://storage.googleapis.com/sfr-vision-language-research/datasets/flickr30k_test.json),
            - ``flickr30k_test_karpathy.txt`` as CLIP_benchmark uses it
              (https://github.com/mehdidc/retrieval_annotations/releases/tag/1.0.0),
            - ``results_20130124.token``, which comes with the images and has no splits.
        split: ``train``, ``val`` or ``test``.  A file without splits must have the split's name in its own, or be
            taken whole with ``all``.
    """
    check_file('flickr30k', 'annotations', annotations)
    found = _of_split('flickr30k', annotations, split, read_splits(annotations))
    return retrieval_set('flickr30k', found, annotations, images)


def coco(images: str, annotations: str, split: str = 'test', captions_per_image: Optional[Count] = 5) -> RetrievalSet:
    """COCO: 5,000 images of val2014 (test, 5K).

    The images (val2014.zip, 6 GB; https://cocodataset.org/#download; annotations CC BY 4.0, images under Flickr's
    terms) are unpacked to ``val2014/``, for the other splits also ``train2014/``.

    Args:
        images: Folder that has ``val2014/``, or that which the paths in `annotations` start from.  It may be a symbolic
            link, but what is in it may not lead out of it.
        annotations: One of

            - ``dataset_coco.json`` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip),
            - ``coco_karpathy_test.json`` as BLIP and LLM2CLIP use it
              (https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_test.json),
            - a file in COCO's own format, such as ``coco_test_karpathy.json`` as CLIP_benchmark uses it
              (https://github.com/mehdidc/retrieval_annotations/releases/tag/1.0.0), or ``captions_val2017.json``; its
              names start from ``val2014`` or ``val2017``.
        split: ``train``, ``restval``, ``val`` or ``test``.  A file without splits must have the split's name in its
            own, or be taken whole with ``all``.
        captions_per_image: The first so many captions; a few images have six or seven.  Null: all, as CLIP_benchmark
            takes them.
    """
    check_file('coco', 'annotations', annotations)
    found = _of_split('coco', annotations, split, read_splits(annotations))
    found = ((image, captions[:captions_per_image]) for image, captions in found)
    return retrieval_set('coco', found, annotations, images)


def _of_split(
    name: str, annotations: str, split: str, splits: Mapping[Optional[str], Images], more: str = ''
) -> Images:
    """Image files and captions, of one split."""
    if splits.keys() != {None}:
        check_has_split(name, split, [there for there in splits if there is not None], annotations)
        return splits[split]
    # A file without splits is one: its name should say which.
    if split != 'all' and split not in Path(annotations).name.lower():
        raise ConfigError(f'{name}: source.split: {annotations} has no splits, and its name does not say {split!r}; '
                          f'split: all takes all of it{more}')
    return splits[None]
