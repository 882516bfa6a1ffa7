# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Reader of webdataset tars, in which files with the same name and different suffixes form a sample."""

import re
import tarfile
from collections.abc import Container, Iterator
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from llm2clip.errors import FileError
from llm2clip.io.files import reading

IMAGES = ('jpg', 'jpeg', 'png', 'webp')
"""Suffixes of images."""
# Members with metadata of the tar, not of a sample.
_METADATA = re.compile(r'__[^/]*__($|/)')


def tar_samples(
    path: str, wanted: Container[str], image_places: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar: lower-case suffix -> content of the file, and ``__key__`` -> the name.

    Args:
        path: Path of the tar.
        wanted: Suffixes of the files to read; other files have the value None.
        image_places: Yield the byte offset and length of each image in place of its bytes.  The tar must not
            be compressed.

    Raises:
        FileError: The tar is damaged, truncated or followed by data, or a member is a duplicate, or a link to
            a file outside of the tar.  The message names the tar.
    """
    with reading(path, 'a whole tar with every file once'):
        yield from group_by_keys(_files(path, wanted, image_places))


def _files(path: str, wanted: Container[str], image_places: bool) -> Iterator[dict[str, Any]]:
    """Name and content of each file, as `group_by_keys` expects them."""
    with tarfile.open(path, 'r:' if image_places else 'r') as tar:
        for member in iter(tar.next, None):
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep every header
            if member.isdir() or _METADATA.match(member.name):
                continue
            file: Any = tar.extractfile(member)  # fails for a link to a file that is not in the tar
            _, suffix = base_plus_ext(member.name)
            suffix = (suffix or '').lower()
            content = None
            if image_places and suffix in IMAGES:
                content = member.offset_data, member.size
            elif suffix in wanted:
                content = file.read()
            yield {'fname': member.name, 'data': content, '__url__': path}
        # `tarfile` ends at a damaged or missing header, but zeros follow the last member of a whole tar.
        rest: Any = tar.fileobj
        rest.seek(tar.offset)
        are_zeros = {not block.strip(b'\0') for block in iter(lambda: rest.read(1 << 20), b'')}
        if are_zeros != {True}:
            raise FileError(f'is cut off, or has no header of a file, at byte {tar.offset:,}, expected a '
                            'whole tar, with nothing but zeros at its end', path)
    yield {}  # ends the last sample
