# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The image files of a folder."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Union

from llm2clip.config import ConfigError

__all__ = ['IMAGE_SUFFIXES', 'FileState', 'FoundFiles', 'find_images']

IMAGE_SUFFIXES = ('.avif', '.bmp', '.gif', '.jfif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


class FileState(NamedTuple):
    """What tells that a file has not changed."""

    size: int
    mtime_ns: int


class FoundFiles(NamedTuple):
    """What is in a folder."""

    images: dict[str, FileState]
    """Path inside the folder -> state, in the order of the paths."""
    others: Counter[str]
    """Suffix -> number of files that are left out by it."""


def find_images(folder: Union[str, Path]) -> FoundFiles:
    """Every image file of a folder and of those in it, by its suffix; hidden files and folders are left out.

    Links to folders are followed, to each folder once.

    Raises:
        ConfigError: There is no such folder, it has no images, or a folder in it cannot be read.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f'images: there is no folder {folder}')
    images: dict[str, FileState] = {}
    others: Counter[str] = Counter()
    root = os.path.join(folder, '')
    for entry in _walk(root):
        suffix = os.path.splitext(entry.name)[1].lower()
        if not entry.is_file():
            others['broken link' if entry.is_symlink() else 'no regular file'] += 1
        elif suffix in IMAGE_SUFFIXES:
            with contextlib.suppress(FileNotFoundError):  # removed just now
                stat = entry.stat()
                images[entry.path.removeprefix(root)] = FileState(stat.st_size, stat.st_mtime_ns)
        else:
            others[suffix or 'no suffix'] += 1
    if not images:
        raise ConfigError(f'images: no image in {folder} or the folders in it; expected files that end in '
                          f'{", ".join(IMAGE_SUFFIXES)}, found {_counts(others) or "no file"}')
    return FoundFiles(dict(sorted(images.items())), others)


def _counts(others: Counter[str]) -> str:
    return ', '.join(f'{number:,} {suffix}' for suffix, number in others.most_common(5))


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """What is below a folder and is no folder."""
    folders, seen = [folder], set()
    while folders:
        folder = folders.pop()
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise ConfigError(f'images: {folder} cannot be read: {error.strerror}') from None
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            else:
                yield entry
