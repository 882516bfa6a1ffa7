# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions in other languages: Chinese ones of Flickr30k's and COCO's images, and Crossmodal-3600's in 36."""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Count
from llm2clip.data.caption_files import field, read_json_lines, read_lines, text_field, texts_field
from llm2clip.data.published_captions import captions_of_lines
from llm2clip.evaluation.sets.files import RetrievalSet, check_file, found_in, retrieval_set
from llm2clip.files import FileError, reading

__all__ = ['Base64Images', 'LANGUAGES', 'coco_cn', 'flickr_cn', 'xm3600']

LANGUAGES = (
    'ar', 'bn', 'cs', 'da', 'de', 'el', 'en', 'es', 'fa', 'fi', 'fil', 'fr', 'he', 'hi', 'hr', 'hu', 'id', 'it', 'ja',
    'ko', 'mi', 'nl', 'no', 'pl', 'pt', 'quz', 'ro', 'ru', 'sv', 'sw', 'te', 'th', 'tr', 'uk', 'vi', 'zh',
)
_CAPTIONS = 'imageid.human-written-caption.txt'
_SPLITS = ('train', 'val', 'test')


def flickr_cn(images: str, annotations: str) -> RetrievalSet:
    """Flickr30k-CN (Lan et al., ACM MM 2017): Flickr30k's 1,000 test images with 5 translations each.

    Args:
        images: Folder of Flickr30k's images (see `flickr30k`); with Chinese-CLIP's files, ``test_imgs.tsv``.
        annotations: One of

            - ``flickr30k_cn_test.txt`` of Flickr30k-CNA (https://zero.so.com), of the same translations,
            - ``seg.flickr30kzhmbosontest.caption.txt`` of the original package
              (https://github.com/li-xirong/cross-lingual-cap), split into words, which are put together again,
            - ``flickr30k_test_zh.txt`` as CLIP_benchmark uses it
              (https://github.com/mehdidc/retrieval_annotations/releases/tag/1.0.0),
            - ``test_texts.jsonl`` of Chinese-CLIP
              (https://huggingface.co/datasets/OFA-Sys/chinese-clip-eval/resolve/main/Flickr30k-CN.zip).
    """
    check_file('flickr_cn', 'annotations', annotations)
    if annotations.endswith('.jsonl'):
        return _chinese_clip('flickr_cn', images, annotations)
    found = captions_of_lines(annotations).items()
    return retrieval_set('flickr_cn', found, annotations, images)


def coco_cn(images: str, annotations: str, split: str = 'test') -> RetrievalSet:
    """COCO-CN (arXiv 1805.08661): 1,000 COCO images with 1,053 captions written in Chinese (test).

    Args:
        images: Folder that has COCO's ``train2014/`` and ``val2014/`` (see `coco`); with Chinese-CLIP's files,
            ``test_imgs.tsv``.
        annotations: The folder ``coco-cn-version1805v1.1`` (on request at https://github.com/li-xirong/coco-cn; also
            https://huggingface.co/datasets/AIMClab-RUC/COCO-CN) with ``imageid.human-written-caption.txt`` and
            ``coco-cn_<split>.txt``; or Chinese-CLIP's ``test_texts.jsonl``.
        split: ``train``, ``val`` or ``test``.
    """
    if annotations.endswith('.jsonl'):
        check_file('coco_cn', 'annotations', annotations)
        return _chinese_clip('coco_cn', images, annotations)
    captions_file, split_file = Path(annotations, _CAPTIONS), Path(annotations, f'coco-cn_{split}.txt')
    if not captions_file.is_file():
        raise ConfigError(f'coco_cn: source.annotations: expected {_CAPTIONS} and coco-cn_<split>.txt in '
                          f'{annotations}; {found_in(Path(annotations))}')
    if not split_file.is_file():
        there = [name for name in _SPLITS if Path(annotations, f'coco-cn_{name}.txt').is_file()]
        raise ConfigError(f'coco_cn: source.split: there is no {split_file}; the splits there are '
                          f'{", ".join(there) or "none"}')
    captions = captions_of_lines(str(captions_file))
    names = [f'{image}.jpg' for _, image in read_lines(str(split_file))]
    found = [(f'{_coco_folder(name)}/{name}', captions.get(name, [])) for name in names]
    return retrieval_set('coco_cn', found, f'{captions_file} and {split_file.name}', images)


def _coco_folder(name: str) -> str:
    """``val2014`` of ``COCO_val2014_000000043734.jpg``."""
    parts = name.split('_')
    if len(parts) != 3 or parts[0] != 'COCO':
        raise FileError(f'coco_cn: expected image ids such as COCO_val2014_000000043734, found '
                         f'{name.removesuffix(".jpg")!r}')
    return parts[1]


def _chinese_clip(name: str, images: str, texts: str) -> RetrievalSet:
    """Chinese-CLIP's files: `images` has one line ``<id><tab><base64>`` per image, `texts` one object per text."""
    check_file(name, 'images', images)
    read_image, ids = Base64Images.index(name, images)
    captions: dict[str, list[str]] = {image: [] for image in ids}
    for where, record in read_json_lines(texts):
        of = field(record, 'image_ids', where)
        if not isinstance(of, list) or len(of) != 1:
            raise FileError(f'{where}: expected one image in \'image_ids\', found {str(of)[:60]}')
        if str(of[0]) not in captions:
            raise ConfigError(f'{name}: {where}: image {of[0]} is missing in {images}, which has {len(ids):,} others')
        captions[str(of[0])].append(text_field(record, 'text', where))
    return retrieval_set(name, captions.items(), texts, read_image)


@dataclass(frozen=True)
class Base64Images:
    """Reads images that lie in a text file in base64, by position."""

    path: str
    spans: list[tuple[int, int]]
    """Where each image begins and how long it is, in bytes."""

    @classmethod
    def index(cls, name: str, path: str) -> tuple['Base64Images', list[str]]:
        """A reader of a file, and the ids of its images."""
        ids: dict[str, tuple[int, int]] = {}
        begin = 0
        with reading(path, 'lines of `<id><tab><image in base64>`'), open(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                key, tab, data = line.rstrip().partition(b'\t')
                if line.strip():
                    if not tab:
                        raise FileError(f'{path}:{number}: expected `<id><tab><image in base64>`, found {line[:60]!r}')
                    if key.decode() in ids:
                        raise FileError(f'{name}: image {key.decode()} occurs twice in {path}')
                    ids[key.decode()] = begin + len(key) + 1, len(data)
                begin += len(line)
        return cls(path, list(ids.values())), list(ids)

    def __call__(self, position: int) -> bytes:
        begin, length = self.spans[position]
        with reading(self.path, 'images in base64'), open(self.path, 'rb') as file:
            file.seek(begin)
            data = file.read(length)
        try:
            return base64.b64decode(data, altchars=b'-_' if set(b'-_') & set(data) else None, validate=True)
        except binascii.Error as error:
            raise FileError(f'{self.path}: image {position} is not base64: {error}') from None


def xm3600(images: str, annotations: str, language: str, captions_per_image: Optional[Count] = None) -> RetrievalSet:
    """XM3600 (arXiv 2205.12522): 3,600 images with about two captions per language.

    Args:
        images: Folder that ``images.tgz`` unpacks to, ``<key>.jpg``
            (https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz, 300 MB; from Open Images, CC BY).
        annotations: ``captions.jsonl`` of https://google.github.io/crossmodal-3600/web-data/captions.zip (CC BY 4.0).
        language: One of `LANGUAGES`; ``'no'`` needs its quotes in YAML.
        captions_per_image: The first so many captions.  Null: all; CLIP_benchmark takes 1.
    """
    if language not in LANGUAGES:
        quotes = "; in YAML, 'no' needs quotes" if isinstance(language, bool) else ''
        raise ConfigError(f'xm3600: source.language: there is no {language!r}; there are {", ".join(LANGUAGES)}'
                          f'{quotes}')
    name = f'xm3600_{language}'
    check_file(name, 'annotations', annotations)
    found = []
    for where, record in read_json_lines(annotations):
        captions = texts_field(field(record, language, where), 'caption', f'{where}, {language}')
        found.append((f'{text_field(record, "image/key", where)}.jpg', captions[:captions_per_image]))
    return retrieval_set(name, found, annotations, images)
