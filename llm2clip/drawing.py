# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures that steps draw with matplotlib: their texts are no formulas, and an error in one ends no step."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, get_font

__all__ = ['drawable', 'drawing']


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Print a warning that names the picture in place of an error; a `$` in a text is drawn as it is."""
    try:
        # With a salt, the same picture is the same bytes as SVG.
        with matplotlib.rc_context({'text.parse_math': False, 'svg.hashsalt': 'llm2clip'}):
            yield
    except Exception as error:  # layout, fonts and backends raise errors of any kind
        print(f'warning: {name} was not drawn: {error!r}', flush=True)


def drawable(text: str) -> str:
    """The text on one line, with `…` in place of characters that matplotlib's font lacks, as those of Japanese."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return re.sub('…+', '…', ''.join(char if ord(char) in glyphs else '…' for char in ' '.join(text.split())))
