# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text pairs as the E5 and Echo embedding data have them: JSON lines of `query`, `positive` and maybe `negative`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Union

from llm2clip.data.caption_files import read_json_lines
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits, is_held_out, matching_files

__all__ = ['text_pairs']


def text_pairs(files: Union[str, Sequence[str]], heldout_share: float = 0.0) -> tuple[Splits, Dropped]:
    """``train`` and, if asked for, ``heldout`` splits with captions ``query``, ``positive`` and ``negative``.

    A line without `negative` gets an empty one.  A pair with an empty side is left out and counted.

    Args:
        files: Paths or patterns of JSONL files; a sample's id is ``<file name>:<line>``.
        heldout_share: Share of the lines held out, chosen by the hash of their id.

    Raises:
        ConfigError: No file matches.
        ValueError: A line is not a pair; the message names file and line.
    """
    paths = matching_files(files)

    def samples(name: str, held_out: bool, dropped: Dropped) -> Iterator[Sample]:
        for where, record in read_json_lines(name):
            sample_id = Path(where).name
            if is_held_out(sample_id, heldout_share) is held_out:
                yield Sample(sample_id, _pair(record, where), required=('query', 'positive'))

    def parts(held_out: bool) -> list[Part]:
        return [Part(Path(name).name, partial(samples, name, held_out)) for name in paths]

    return {'train': parts(False), **({'heldout': parts(True)} if heldout_share else {})}, Dropped()


def _pair(record: Any, where: str) -> dict[str, str]:
    texts = {}
    for key in ('query', 'positive', 'negative'):
        value = record.get(key) if isinstance(record, dict) else None
        value = '' if value is None and key == 'negative' else value
        if not isinstance(value, str):
            raise ValueError(f'{where}: expected an object with texts `query`, `positive` and maybe `negative`; '
                             f'{key} is {value!r}')
        texts[key] = value
    return texts
