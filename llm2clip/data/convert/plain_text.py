# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Plain text files, such as WikiText, for the MNTP warm start."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Union

from llm2clip.data.caption_files import read_lines
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits, matching_files

__all__ = ['plain_text']


def plain_text(files: Union[str, Sequence[str]], min_characters: int = 40) -> tuple[Splits, Dropped]:
    """A ``train`` split with the caption ``text``: one sample per line that is long enough.

    Args:
        files: Paths or patterns of text files; a sample's id is ``<file name>:<line>``.
        min_characters: Shorter lines, such as headings, are left out and counted; blank ones are nothing.

    Raises:
        ConfigError: No file matches.
    """
    paths = matching_files(files)

    def samples(name: str, dropped: Dropped) -> Iterator[Sample]:
        for where, line in read_lines(name):
            if len(line) >= min_characters:
                yield Sample(Path(where).name, {'text': line})
            else:
                dropped.filter('short line')

    return {'train': [Part(Path(name).name, partial(samples, name)) for name in paths]}, Dropped()
