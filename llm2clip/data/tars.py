# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Reader of webdataset tars, in which files with the same name and different suffixes form a sample."""

import re
import tarfile
from collections.abc import Callable, Container, Iterator
from typing import Any, Literal, Optional

from webdataset.tariterators import base_plus_ext, group_by_keys

from llm2clip.errors import FileError
from llm2clip.io.files import reading
from llm2clip.io.folders import stays_inside

IMAGES = ('jpg', 'jpeg', 'png', 'webp')
"""Suffixes of images."""
_LONGEST_TEXT = 1 << 24
# Members with metadata of the tar, not of a sample.
_METADATA = re.compile(r'__[^/]*__($|/)')


def tar_samples(
    path: str, of_image: Optional[Callable[[tarfile.TarInfo], Any]] = None, mode: Literal['r', 'r:'] = 'r',
    wanted: Optional[Container[str]] = None,
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar: lower-case suffix -> content of the file, and ``__key__`` -> name of the sample.

    Args:
        path: Path of the tar.
        of_image: Function that returns the value of an image, in place of reading its bytes.
        mode: As for `tarfile.open`: ``r`` also reads compressed tars, ``r:`` does not.
        wanted: Suffixes of the files to read, by default all; other files have the value None.

    Raises:
        FileError: The tar is damaged, truncated or followed by data, or a member is a duplicate, a link,
            outside of the tar, or a text above 16 MiB.  The message names the tar.
    """
    def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
        is_image = member.name.lower().endswith(IMAGES)
        if is_image and of_image is not None:
            return of_image(member)
        if member.size > _LONGEST_TEXT and not is_image:
            raise FileError(f'{path}: {member.name!r} has {member.size:,} bytes, expected a text of at most '
                            f'{_LONGEST_TEXT:,}')
        file = tar.extractfile(member)
        assert file is not None
        return file.read()

    def files() -> Iterator[dict[str, Any]]:
        with tarfile.open(path, mode) as tar:
            for member in iter(tar.next, None):
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep every header
                name = member.name
                if not stays_inside(name):
                    raise FileError(f'{path}: the path {name!r} leads out of the tar, expected one inside')
                if not member.isdir() and not member.isreg():
                    raise FileError(f'{path}: {name!r} is a link or a device, expected a file')
                if member.isreg() and not _METADATA.match(name):
                    _, suffix = base_plus_ext(name)
                    is_wanted = wanted is None or (suffix or '').lower() in wanted
                    yield {'fname': name, 'data': content(tar, member) if is_wanted else None, '__url__': path}
            # `tarfile` treats an unreadable or missing header as the end of the tar, so the rest is checked here.
            file = tar.fileobj
            assert file is not None
            file.seek(tar.offset)
            zeros = [not block.strip(b'\0') for block in iter(lambda: file.read(1 << 20), b'')]
            if not zeros or not all(zeros):
                raise FileError(f'{path}: is cut off, or has no header of a file, at byte {tar.offset:,}, expected '
                                'a whole tar, with nothing but zeros at its end')
        yield {}  # ends the last sample

    with reading(path, 'a whole tar with every file once'):
        yield from group_by_keys(files())
