# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Queries typed one after the other."""

import contextlib
import time
from collections.abc import Callable, Iterator

from llm2clip.config import ConfigError
from llm2clip.search.answers import Answer, Query, answer_lines, read_queries

__all__ = ['typed_answers']


def typed_answers(answer: Callable[[list[Query]], list[Answer]], ask: Callable[[str], str] = input) -> Iterator[Answer]:
    """Ask for queries, print their answers and yield them, until an empty line or the end of the input.

    Args:
        answer: Of queries.
        ask: Reads a line after showing a prompt.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has a history and keys to edit the line
    while True:
        try:
            line = ask('a text or an image file (nothing ends): ').strip()
        except EOFError:
            return
        if not line:
            return
        start = time.monotonic()
        try:
            found, = answer(read_queries(line))
        except ConfigError as error:
            print(error)
            continue
        print('\n'.join(answer_lines(found)[1:]))
        print(f'{time.monotonic() - start:.3f} s')
        yield found
