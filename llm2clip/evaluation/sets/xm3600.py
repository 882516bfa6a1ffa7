# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Crossmodal-3600: captions in 36 languages, written, not translated."""

from typing import Optional

from llm2clip.config import ConfigError
from llm2clip.data.caption_files import read_json_lines
from llm2clip.evaluation.sets.base import RetrievalSet
from llm2clip.evaluation.sets.files import check_file, field, retrieval_set, text_field, texts_field

__all__ = ['LANGUAGES', 'xm3600']

LANGUAGES = (
    'ar', 'bn', 'cs', 'da', 'de', 'el', 'en', 'es', 'fa', 'fi', 'fil', 'fr', 'he', 'hi', 'hr', 'hu', 'id', 'it', 'ja',
    'ko', 'mi', 'nl', 'no', 'pl', 'pt', 'quz', 'ro', 'ru', 'sv', 'sw', 'te', 'th', 'tr', 'uk', 'vi', 'zh',
)


def xm3600(
    images: str, annotations: str, language: str, captions_per_image: Optional[int] = None
) -> RetrievalSet:
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
