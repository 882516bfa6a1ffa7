# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text files with one caption per line, as Flickr30k and its relatives publish them."""

import re

from llm2clip.data.caption_files import read_lines

__all__ = ['captions_of_lines']

# `1000092795.jpg#0<tab>A caption`, `1009692167#zhm#1 <caption>`, `6228559981<tab><caption>`
_NUMBERED = re.compile(r'(?P<image>[^#\s,]+)(?:#\S*)?\s+(?P<caption>.+)')
# `1007129816.jpg,A caption`: CLIP_benchmark's files, which quote nothing
_COMMA = re.compile(r'(?P<image>[^\s,]+\.jpg),(?P<caption>.*)')
# `一条:q 狗:n 。:wj`: every word with its part of speech
_SEGMENTED = re.compile(r'\S+:[a-z]+[0-9]*(?:\s+\S+:[a-z]+[0-9]*)*')


def captions_of_lines(path: str) -> dict[str, list[str]]:
    """Image file -> captions.

    Lines are ``<image>#<number><tab or space><caption>``, where the number may be missing and the image may lack
    ``.jpg``; or, under a header, ``<image>.jpg,<caption>``.  Chinese that is split into words with their parts of
    speech is put together again.

    Raises:
        ValueError: A line has neither form; the message names file and line.
    """
    captions: dict[str, list[str]] = {}
    lines = list(read_lines(path))
    form = _COMMA if any(_COMMA.fullmatch(line) for _, line in lines[1:2]) else _NUMBERED
    if form is _COMMA and not _COMMA.fullmatch(lines[0][1]):
        lines = lines[1:]
    for where, line in lines:
        match = form.fullmatch(line)
        if match is None:
            raise ValueError(f'{where}: expected `<image>#<number><tab><caption>` or `<image>.jpg,<caption>`, found '
                             f'{line[:60]!r}')
        image, caption = match['image'], match['caption']
        image = image if image.endswith('.jpg') else f'{image}.jpg'
        if _SEGMENTED.fullmatch(caption):
            caption = ''.join(word.rsplit(':', 1)[0] for word in caption.split())
        captions.setdefault(image, []).append(caption)
    return captions
