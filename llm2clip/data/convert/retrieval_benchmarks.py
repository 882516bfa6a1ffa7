# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval benchmarks with long captions or many languages: ShareGPT4V-1k, Urban1k, DOCCI and XM3600."""

from pathlib import Path
from typing import Optional

from llm2clip.config.ranges import Count, Texts
from llm2clip.data.caption_files import read_json_lines
from llm2clip.data.convert.flickr_coco import published_splits
from llm2clip.data.convert.image_folder import image_splits
from llm2clip.data.convert.samples import Dropped, Part
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import read_json, read_text, reading


def sharegpt4v(images: str, annotations: str, first: Count = 1000) -> tuple[dict[str, list[Part]], Dropped]:
    """ShareGPT4V-1k, the test set of Long-CLIP (arXiv 2403.15378): the first 1,000 of 1.2 million captions.

    As in Long-CLIP, line breaks become spaces.

    Args:
        images: Folder in ShareGPT4V's layout (``sam/images``, ``coco/train2017``,
            ``llava/llava_pretrain/images``).  Only the images of the first captions are needed.
        annotations: ``share-captioner_coco_lcs_sam_1246k_1107.json``, which is read whole.
        first: Number of captions.
    """
    records = read_json(annotations, list)
    if len(records) < first:
        raise FileError(f'has {len(records):,} values, expected at least {first:,}', annotations)
    captions: list[tuple[str, list[str]]] = []
    with reading(annotations, 'images with conversations, in each of which the second turn is the caption'):
        for record in records[:first]:
            caption = record['conversations'][1]['value'].replace('\n', ' ')
            captions.append((record['image'], [caption]))
    return published_splits(images, [annotations], {'test': captions})


def urban1k(folder: str) -> tuple[dict[str, list[Part]], Dropped]:
    """Urban1k of Long-CLIP (arXiv 2403.15378): 1,000 city scenes from Visual Genome.

    Args:
        folder: Unpacked ``Urban1k.zip`` with ``image/<number>.jpg`` and ``caption/<number>.txt``.  Only the
            first line of a caption file is used.
    """
    paths = [*Path(folder, 'image').glob('[!.]*.jpg'), *Path(folder, 'caption').glob('[!.]*.txt')]
    if not paths:
        raise ConfigError(f'{folder} has no image/<number>.jpg and caption/<number>.txt', 'source.folder')
    files: list[str] = []
    captions: list[tuple[str, list[str]]] = []
    for stem in sorted({path.stem for path in paths}, key=lambda stem: (len(stem), stem)):  # 2 before 10
        file = f'{folder}/caption/{stem}.txt'
        files.append(file)
        captions.append((f'{stem}.jpg', read_text(file).splitlines()[:1]))
    return published_splits(f'{folder}/image', files, {'test': captions})


def docci(
    images: Optional[str], annotations: str, splits: Optional[Texts] = None
) -> tuple[dict[str, list[Part]], Dropped]:
    """DOCCI (arXiv 2404.19753, CC BY 4.0): images with one long description each, 5,000 of them in ``test``.

    Args:
        images: Folder ``images`` of the unpacked ``docci_images.tar.gz``; null for captions alone.
        annotations: ``docci_descriptions.jsonlines``.
        splits: Splits to write, of ``train``, ``test``, ``qual_dev`` and ``qual_test``; by default all.
    """
    by_split: dict[Optional[str], list[tuple[str, list[str]]]] = {}
    for where, record in read_json_lines(annotations):
        with reading(where, 'an image of DOCCI with its split and description'):
            image = record['image_file'], [record['description']]
            by_split.setdefault(record['split'], []).append(image)
    return published_splits(images, [annotations], by_split, splits)


def xm3600(images: str, annotations: str) -> tuple[dict[str, list[Part]], Dropped]:
    """XM3600 (arXiv 2205.12522): 3,600 images with about two captions in each of 36 languages.

    The split is ``test``, and the caption keys are ``<language>_0``, ``<language>_1``, ….

    Args:
        images: Folder of the unpacked ``images.tgz``, with ``<key>.jpg``.
        annotations: ``captions.jsonl``.
    """
    captions: dict[str, dict[str, str]] = {}
    for where, record in read_json_lines(annotations):
        with reading(where, 'an image of XM3600 with its captions in each language'):
            translations = captions.setdefault(record['image/key'] + '.jpg', {})
            for language, texts in record.items():
                if isinstance(texts, dict):
                    for i, text in enumerate(texts['caption']):
                        translations[f'{language}_{i}'] = text
    return image_splits(images, [annotations], captions, {'test': list(captions)}), Dropped()
