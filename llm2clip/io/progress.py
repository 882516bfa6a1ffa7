# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Progress bars off a terminal: at most one line per ten seconds, of all bars together."""

import io
import sys
import time
from functools import cache, partialmethod
from typing import Any

from tqdm import tqdm

_SECONDS = 10.0
_CURSOR_UP = '\x1b[A'


class _LogLines(io.TextIOBase):
    """File of progress bars that writes their newest state to stderr, each time that a line is due.

    A bar that ends before its first line is due leaves none.
    """

    def __init__(self) -> None:
        self._last_time = time.monotonic()

    def write(self, text: str, /) -> int:
        line = ' '.join(text.replace(_CURSOR_UP, '').split())  # bars pad their lines with spaces
        if line and time.monotonic() >= self._last_time + _SECONDS:
            print(line, file=sys.stderr, flush=True)
            self._last_time = time.monotonic()
        return len(text)

    def fileno(self) -> int:
        return sys.stderr.fileno()


@cache
def _log_lines() -> _LogLines:
    return _LogLines()


def progress_file() -> Any:
    """Return the file for a progress bar: stderr if that is a terminal."""
    return sys.stderr if sys.stderr.isatty() else _log_lines()


@cache
def limit_progress() -> None:
    """Off a terminal, let all bars of tqdm, also those of libraries, write to `progress_file` by default."""
    if not sys.stderr.isatty():
        tqdm.__init__ = partialmethod(tqdm.__init__, file=progress_file())  # pyright: ignore
