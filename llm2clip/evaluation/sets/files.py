# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Types of evaluation sets, and the image readers and file checks that the loaders share."""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Union

from llm2clip.errors import ConfigError
from llm2clip.io.files import reading
from llm2clip.io.folders import inside

_NAMES_SHOWN = 6


@dataclass(frozen=True)
class RetrievalSet:
    """Images with captions; every caption belongs to one image."""

    name: str
    image_ids: list[str]
    """Unique, in the published order."""
    captions: list[list[str]]
    """Captions per image, stripped of white space; images without captions do not count."""
    read_image: Callable[[int], bytes]
    """Position -> encoded image; picklable."""

    @property
    def texts(self) -> list[str]:
        """The T captions of all images, image by image."""
        return list(itertools.chain.from_iterable(self.captions))


@dataclass(frozen=True)
class ClassificationSet:
    """Images with one class each, or with any number of them."""

    name: str
    image_ids: list[str]
    labels: Union[list[int], list[list[int]]]
    """Position of each image's class in `classes`.  For sets with any number of classes per image, a 1 or a 0
    per class and image."""
    classes: list[str]
    """Class names as used in prompts; duplicates are allowed."""
    read_image: Callable[[int], bytes]
    """Position -> encoded image; picklable."""
    templates: Optional[str] = None
    """File with the set's own prompts, if any."""


EvaluationSet = Union[RetrievalSet, ClassificationSet]


@dataclass(frozen=True)
class ImageFiles:
    """Reader of image files by position."""

    folder: str
    files: Sequence[str]

    @classmethod
    def open(cls, name: str, folder: str, files: Sequence[str], source: str) -> 'ImageFiles':
        """Return a reader of `files`, paths inside `folder` that `source` lists.

        Raises a ConfigError if the folder or images are missing, a FileError if a path leads out of it.
        """
        check_path(name, 'images', folder, 'folder')
        missing = [file for file in files if not os.path.isfile(inside(folder, file, source))]
        if missing:
            first = Path(folder, missing[0])
            raise ConfigError(f'{name}: {len(missing):,} of {len(files):,} images are missing, the first of them is '
                              f'{first}; {found_in(first.parent)}')
        return cls(folder, files)

    def __call__(self, position: int) -> bytes:
        path = Path(self.folder, self.files[position])
        with reading(path, 'an image'):
            return path.read_bytes()


def check_path(name: str, key: str, path: str, kind: Literal['file', 'folder'] = 'file') -> None:
    """Raise a ConfigError unless the file or folder exists."""
    exists = Path(path).is_file() if kind == 'file' else Path(path).is_dir()
    if not exists:
        raise ConfigError(f'{name}: source.{key}: there is no {kind} {path}; {found_in(Path(path))}')


def visible_files(folder: Path, suffixes: Sequence[str], expected: str) -> list[str]:
    """Return the sorted names in a folder, without hidden ones; a ConfigError if one has none of the suffixes."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
    for name in names:
        if not name.lower().endswith(tuple(suffixes)):
            raise ConfigError(f'expected only {expected} {folder}, found {name}')
    return names


def found_in(folder: Path) -> str:
    """Return a summary of the names in a folder, or in its nearest existing parent, for messages."""
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(os.listdir(folder))
    if not names:
        return f'{folder} is empty'
    more = f' and {len(names) - _NAMES_SHOWN:,} more' if len(names) > _NAMES_SHOWN else ''
    return f'{folder} has {", ".join(names[:_NAMES_SHOWN])}{more}'
