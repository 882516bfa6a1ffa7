# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sets with long captions, one per image: ShareGPT4V-1k, Urban1k, DOCCI."""

import re
from pathlib import Path

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Count
from llm2clip.data.caption_files import field, list_field, numbered, read_json_lines, text_field
from llm2clip.evaluation.sets.files import (
    RetrievalSet,
    check_file,
    found_in,
    of_split,
    read_first,
    retrieval_set,
    visible_files,
)
from llm2clip.files import FileError, read_text

__all__ = ['docci', 'sharegpt4v', 'urban1k']


def sharegpt4v(images: str, annotations: str, first: Count = 1000) -> RetrievalSet:
    """ShareGPT4V-1k, the test set of Long-CLIP (arXiv 2403.15378): the first 1,000 of 1.2 million captions.

    Args:
        images: Folder with ShareGPT4V's layout of images (``sam/images``, ``coco/train2017``,
            ``llava/llava_pretrain/images``; https://github.com/beichenzbc/Long-CLIP/blob/main/train/train.md says where
            each comes from).  Only those of the first captions need to be there; a message names what is missing.
        annotations: ``share-captioner_coco_lcs_sam_1246k_1107.json`` (1.5 GB, of which only the beginning is read;
            https://huggingface.co/datasets/Lin-Chen/ShareGPT4V, CC BY-NC 4.0).
        first: How many.
    """
    check_file('sharegpt4v', 'annotations', annotations)
    found = []
    for where, record in numbered(read_first(annotations, first), f'{annotations}, value'):
        turns = list_field(record, 'conversations', where)
        answer = next((turn for turn in turns if field(turn, 'from', where) == 'gpt'), None)
        if answer is None:
            raise FileError(f'{where}: no turn of the conversation is from \'gpt\'')
        found.append((text_field(record, 'image', where), [text_field(answer, 'value', where)]))
    return retrieval_set('sharegpt4v', found, annotations, images)


def urban1k(folder: str) -> RetrievalSet:
    """Urban1k of Long-CLIP (arXiv 2403.15378): 1,000 city scenes from Visual Genome.

    Args:
        folder: What ``Urban1k.zip`` unpacks to: ``image/<number>.jpg`` and ``caption/<number>.txt``, of which the first
            line counts (https://huggingface.co/datasets/BeichenZhang/Urban1k).
    """
    for part in ('image', 'caption'):
        if not Path(folder, part).is_dir():
            raise ConfigError(f'urban1k: source.folder: expected the folders image and caption in {folder}; '
                              f'{found_in(Path(folder))}')
    stems = {part: {Path(name).stem for name in visible_files(Path(folder, part), [suffix], f'{suffix} files in')}
             for part, suffix in (('image', '.jpg'), ('caption', '.txt'))}
    for part, other in (('image', 'caption'), ('caption', 'image')):
        if alone := sorted(stems[part] - stems[other], key=_natural):
            raise ConfigError(f'urban1k: {len(alone):,} of {len(stems[part]):,} files in {folder}/{part} have none of '
                              f'the same name in {folder}/{other}, the first of them is {alone[0]}')
    found = []
    for stem in sorted(stems['caption'], key=_natural):
        lines = read_text(Path(folder, 'caption', f'{stem}.txt')).splitlines()
        found.append((f'{stem}.jpg', lines[:1]))
    return retrieval_set('urban1k', found, f'{folder}/caption', f'{folder}/image')


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', name)]


def docci(images: str, annotations: str, split: str = 'test') -> RetrievalSet:
    """DOCCI (arXiv 2404.19753, CC BY 4.0): 5,000 images with a description each (test).

    Args:
        images: The folder ``images`` that ``docci_images.tar.gz`` unpacks to
            (https://storage.googleapis.com/docci/data/docci_images.tar.gz, 7 GB).
        annotations: https://storage.googleapis.com/docci/data/docci_descriptions.jsonlines .
        split: ``train``, ``test``, ``qual_dev`` or ``qual_test``.
    """
    check_file('docci', 'annotations', annotations)
    found = [(text_field(record, 'image_file', where), [text_field(record, 'description', where)])
             for where, record in of_split('docci', split, read_json_lines(annotations), annotations)]
    return retrieval_set('docci', found, annotations, images)
