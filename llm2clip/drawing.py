# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures that steps draw with matplotlib: their texts are no formulas, and an error in one ends no step."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

__all__ = ['drawing']


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Print a warning that names the picture in place of an error; a `$` in a text is drawn as it is."""
    try:
        # With a salt, the same picture is the same bytes as SVG.
        with matplotlib.rc_context({'text.parse_math': False, 'svg.hashsalt': 'llm2clip'}):
            yield
    except Exception as error:  # layout, fonts and backends raise errors of any kind
        print(f'warning: {name} was not drawn: {error!r}', flush=True)
