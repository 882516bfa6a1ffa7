# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr30k and COCO, whose test sets are those of Karpathy and Fei-Fei (arXiv 1412.2306)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Count
from llm2clip.data.caption_files import field, list_field, numbered, read_csv, text_field, texts_field
from llm2clip.evaluation.sets.files import (
    RetrievalSet,
    captions_of_lines,
    check_file,
    of_split,
    retrieval_set,
)
from llm2clip.files import FileError, parse_json, read_json

__all__ = ['coco', 'flickr30k']

_Images = Iterator[tuple[str, Sequence[str]]]


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
    return retrieval_set('flickr30k', _read('flickr30k', annotations, split), annotations, images)


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
    found = ((image, captions[:captions_per_image]) for image, captions in _read('coco', annotations, split))
    return retrieval_set('coco', found, annotations, images)


def _read(name: str, path: str, split: str) -> _Images:
    """Image file and captions, of one split."""
    check_file(name, 'annotations', path)
    suffix = Path(path).suffix
    if suffix == '.csv':
        return _of_csv(name, path, split)
    content: Any = read_json(path) if suffix == '.json' else None
    if suffix == '.json' and not isinstance(content, list) and not (
            isinstance(content, dict) and 'annotations' in content):
        return _of_splits(name, content, path, split)
    # A file without splits is one: its name should say which.
    if split != 'all' and split not in Path(path).name.lower():
        raise ConfigError(f'{name}: source.split: {path} has no splits, and its name does not say {split!r}; '
                          f'split: all takes all of it')
    if suffix != '.json':
        return iter(captions_of_lines(path).items())
    return _of_list(content, path) if isinstance(content, list) else _of_coco(content, path)


def _of_splits(name: str, content: Any, path: str, split: str) -> _Images:
    """Karpathy's own files."""
    for where, image in of_split(name, split, numbered(field(content, 'images', path), f'{path}, image'), path):
        folder = f'{text_field(image, "filepath", where)}/' if 'filepath' in image else ''
        yield (folder + text_field(image, 'filename', where),
               [text_field(sentence, 'raw', where) for sentence in list_field(image, 'sentences', where)])


def _of_list(content: list[Any], path: str) -> _Images:
    """ALBEF's and BLIP's files."""
    return ((text_field(record, 'image', where), texts_field(record, 'caption', where))
            for where, record in numbered(content, f'{path}, image'))


def _of_coco(content: dict[str, Any], path: str) -> _Images:
    """COCO's own format."""
    captions: dict[Any, list[str]] = {}
    for where, annotation in numbered(content['annotations'], f'{path}, annotation'):
        captions.setdefault(_id(annotation, 'image_id', where), []).append(text_field(annotation, 'caption', where))
    for where, image in numbered(field(content, 'images', path), f'{path}, image'):
        yield text_field(image, 'file_name', where), captions.pop(_id(image, 'id', where), [])


def _id(record: Any, key: str, where: str) -> Any:
    value = field(record, key, where)
    if not isinstance(value, (int, str)):
        raise FileError(f'{where}: {key!r} is {str(value)[:60]!r}, expected a number or a text')
    return value


def _of_csv(name: str, path: str, split: str) -> _Images:
    """The file of nlphuji/flickr30k: the captions of an image are a JSON list in one cell."""
    for where, row in of_split(name, split, read_csv(path), path):
        file = text_field(row, 'filename', where)
        captions = parse_json(text_field(row, 'raw', where), f'{where}, {file}: \'raw\'')
        yield file, texts_field({'raw': captions}, 'raw', f'{where}, {file}')
