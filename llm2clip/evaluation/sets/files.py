# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What an evaluation set is, and what the loaders share: reading, and checking all before an evaluation begins."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional, Union

from llm2clip.config import ConfigError
from llm2clip.files import reading
from llm2clip.folders import inside

__all__ = [
    'ClassificationSet', 'CompositionSet', 'EvaluationSet', 'ImageFiles', 'RetrievalSet', 'check_path', 'found_in',
    'visible_files',
]

_NAMES_SHOWN = 6


@dataclass(frozen=True)
class RetrievalSet:
    """Images with their captions: every caption belongs to one image."""

    name: str
    image_ids: list[str]
    """Unique, in the published order."""
    captions: list[list[str]]
    """The captions of each image, stripped of white space; an image without captions does not count."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""

    @property
    def texts(self) -> list[str]:
        """The T captions of all images, image by image."""
        return [text for captions in self.captions for text in captions]


@dataclass(frozen=True)
class ClassificationSet:
    """Images with one class each, or with any number of them."""

    name: str
    image_ids: list[str]
    labels: Union[list[int], list[list[int]]]
    """The position in `classes` of each image's class.  Of a set with any number of classes per image, for each image a
    1 or a 0 per class."""
    classes: list[str]
    """Class names as prompts use them; several may be the same."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""
    templates: Optional[str] = None
    """The file with the set's own prompts, if it has one."""


class Example(NamedTuple):
    """Two texts that are much alike, of which a model has to say to which image each belongs, by their positions."""

    images: tuple[int, ...]
    """One image, or two."""
    texts: tuple[int, int]
    """The text of the first image, and that of the second, or else one that is wrong."""


class Number(NamedTuple):
    """What is reported of a set: the mean over groups of examples of the share that is right in each."""

    groups: Sequence[Sequence[int]]
    """Positions of examples."""
    score: Literal['text', 'image', 'group'] = 'text'
    """What has to be right: that every image is nearer to its own text than to the other one, that every text is nearer
    to its own image, or both."""


@dataclass(frozen=True)
class CompositionSet:
    """Images with texts that tell whether a model sees how words belong together."""

    name: str
    image_ids: list[str]
    texts: list[str]
    """Different from each other, stripped of white space."""
    examples: list[Example]
    """All with one image, or all with two."""
    units: list[int]
    """Of each example, the number of the photograph or pair that it is about, from 0 on.  Those of one are not
    independent of each other."""
    numbers: dict[str, Number]
    parts: dict[str, list[int]]
    """Name of a relation, a tag, … -> positions of the examples that have it."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""


EvaluationSet = Union[RetrievalSet, ClassificationSet, CompositionSet]


@dataclass(frozen=True)
class ImageFiles:
    """Reads image files by position."""

    folder: str
    files: Sequence[str]

    @classmethod
    def open(cls, name: str, folder: str, files: Sequence[str], source: str) -> 'ImageFiles':
        """A reader of `files`, paths inside `folder` that `source` names.

        A ConfigError says that the folder or images are missing, a FileError that a path leads out of the folder.
        """
        check_path(name, 'images', folder, 'folder')
        if missing := [file for file in files if not os.path.isfile(inside(folder, file, source))]:
            first = Path(folder, missing[0])
            raise ConfigError(f'{name}: {len(missing):,} of {len(files):,} images are missing, the first of them is '
                              f'{first}; {found_in(first.parent)}')
        return cls(folder, files)

    def __call__(self, position: int) -> bytes:
        path = Path(self.folder, self.files[position])
        with reading(path, 'an image'):
            return path.read_bytes()


def check_path(name: str, key: str, path: str, kind: Literal['file', 'folder'] = 'file') -> None:
    """Raise a ConfigError unless there is such a file or folder."""
    if not (Path(path).is_file() if kind == 'file' else Path(path).is_dir()):
        raise ConfigError(f'{name}: source.{key}: there is no {kind} {path}; {found_in(Path(path))}')


def visible_files(folder: Path, suffixes: Sequence[str], expected: str) -> list[str]:
    """Names in a folder but for hidden ones, sorted; a ConfigError says that one has none of the suffixes."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
    for name in names:
        if not name.lower().endswith(tuple(suffixes)):
            raise ConfigError(f'expected only {expected} {folder}, found {name}')
    return names


def found_in(folder: Path) -> str:
    """What a folder has, or if there is none, its nearest parent that exists: for messages."""
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(os.listdir(folder))
    if not names:
        return f'{folder} is empty'
    more = f' and {len(names) - _NAMES_SHOWN:,} more' if len(names) > _NAMES_SHOWN else ''
    return f'{folder} has {", ".join(names[:_NAMES_SHOWN])}{more}'
