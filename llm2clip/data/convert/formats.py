# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which image formats are not read, by the first bytes of a file: for a reason that helps."""

import re
from typing import Optional

__all__ = ['unsupported_format']

_SIGNATURES = {
    'HTML': re.compile(rb'(\xef\xbb\xbf)?\s*<(!doctype html|html)[\s>]', re.IGNORECASE),
    # Before its element may stand declarations and comments.
    'SVG': re.compile(rb'(\xef\xbb\xbf)?\s*(?=<).*?<svg[\s>]', re.DOTALL),
    'gzip (SVGZ)': re.compile(rb'\x1f\x8b'),
    'HEIC': re.compile(rb'.{4}ftyp(heic|heix|hevc|hevx|mif1|msf1)', re.DOTALL),
    'JPEG XL': re.compile(rb'\xff\x0a|\x00\x00\x00\x0cJXL '),
    'PDF': re.compile(rb'%PDF-'),
}
_HEAD = 4096


def unsupported_format(data: bytes) -> Optional[str]:
    """What the file is, if it is no image or an image in a format that is not supported and can be told by its start.

    Args:
        data: A file that cannot be decoded.
    """
    head = data[:_HEAD]
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(head)), None)
