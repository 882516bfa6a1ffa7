# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Webdataset tars: files of one name but for their suffix are a sample."""

import re
import tarfile
from collections.abc import Callable, Container, Iterator
from typing import Any, Literal, Optional

from webdataset.tariterators import base_plus_ext, group_by_keys

from llm2clip.files import FileError, reading
from llm2clip.folders import stays_inside

__all__ = ['IMAGES', 'tar_samples']

IMAGES = ('jpg', 'jpeg', 'png', 'webp')
"""Suffixes of images."""
_LONGEST_TEXT = 1 << 24
# Facts about the tar itself.
_ABOUT = re.compile(r'__[^/]*__($|/)')


def tar_samples(
    path: str, of_image: Optional[Callable[[tarfile.TarInfo], Any]] = None, mode: Literal['r', 'r:'] = 'r',
    wanted: Optional[Container[str]] = None,
) -> Iterator[dict[str, Any]]:
    """The samples of a tar: suffix in small letters -> content of that file, and ``__key__`` -> the sample's name.

    Args:
        path: The tar.
        of_image: What stands for the content of an image, which is then not read.
        mode: As for `tarfile.open`: ``r`` reads compressed tars too, ``r:`` does not.
        wanted: Suffixes of the files that are read, by default all; others have the value None.

    Raises:
        FileError: The tar is damaged or cut off, has a file twice or a text above 16 MiB, has links or paths that lead
            out of it, or more follows its end; the message names it.
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
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # which otherwise grow
                if not stays_inside(member.name):
                    raise FileError(f'{path}: the path {member.name!r} leads out of the tar, expected one inside')
                if not member.isdir() and not member.isreg():
                    raise FileError(f'{path}: {member.name!r} is a link or a device, expected a file')
                if member.isreg() and not _ABOUT.match(member.name):
                    suffix = (base_plus_ext(member.name)[1] or '').lower()
                    kept = content(tar, member) if wanted is None or suffix in wanted else None
                    yield {'fname': member.name, 'data': kept, '__url__': path}
            # `tarfile` takes a header that it cannot read, or none, for the end of a tar that has others.
            file = tar.fileobj
            assert file is not None
            file.seek(tar.offset)
            zeros = [not block.strip(b'\0') for block in iter(lambda: file.read(1 << 20), b'')]
            if not zeros or not all(zeros):
                raise FileError(f'{path}: is cut off, or has no header of a file, at byte {tar.offset:,}, expected a '
                                'whole tar, with nothing but zeros at its end')
        yield {}  # ends the last sample

    with reading(path, 'a whole tar with every file once'):
        yield from group_by_keys(files())
