# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""ImageNet-style folders: one subfolder per class."""

import os
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.data.caption_files import check_text, read_lines
from llm2clip.evaluation.sets.files import (
    ClassificationSet,
    ImageFiles,
    check_file,
    check_folder,
    found_in,
    visible_files,
)
from llm2clip.files import read_json

__all__ = ['imagenet_folder']

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')


def imagenet_folder(images: str, class_names: Optional[str] = None) -> ClassificationSet:
    """Images in one subfolder per class, in the order of the subfolders' names; also those of the linear probe.

    ImageNet's validation images (https://image-net.org, ILSVRC2012, for research only) come in one folder and are moved
    into one folder per class with https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh .

    Args:
        images: Folder of the classes' folders.
        class_names: File with the classes' names; without one, those of the folders.  ``.json``: an object from folder
            to name, a list in the folders' order, or Keras's ``imagenet_class_index.json``.  Text: one name per line in
            the folders' order, or ``<folder> <name>`` per line (``LOC_synset_mapping.txt``).  ``_`` stands for a space.

    Raises:
        ConfigError: `images` has no subfolders, one of them has no images, or the names do not fit them.
    """
    check_folder(images, 'images', images)
    folders = sorted(entry.name for entry in os.scandir(images) if entry.is_dir() and not entry.name.startswith('.'))
    if not folders:
        raise ConfigError(f'{images}: source.images: expected one subfolder per class; {found_in(Path(images))}')
    files, labels = [], []
    for label, folder in enumerate(folders):
        inside = visible_files(Path(images, folder), _SUFFIXES, 'images in the class folder')
        if not inside:
            raise ConfigError(f'the class folder {Path(images, folder)} has no images')
        files += [f'{folder}/{name}' for name in inside]
        labels += [label] * len(inside)
    names = _names(images, class_names, folders) if class_names else folders
    for folder, name in zip(folders, names):
        if not check_text(name, f'{class_names or images}: the name of {folder!r}').strip():
            raise ConfigError(f'source.class_names: {class_names}: the name of {folder!r} is empty, expected a text')
    return ClassificationSet(images, files, labels, [name.replace('_', ' ') for name in names],
                             ImageFiles(images, files))


def _names(images: str, path: str, folders: list[str]) -> list[str]:
    """A name for each folder."""
    check_file(images, 'class_names', path)
    if path.endswith('.json'):
        content: Any = read_json(path)
        pairs = isinstance(content, dict) and all(isinstance(v, list) and len(v) == 2 for v in content.values())
        names = dict(content.values()) if pairs else content
        values = list(names.values()) if isinstance(names, dict) else names
        if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
            raise ConfigError(f'source.class_names: {path}: expected an object from folder to name, a list of names, '
                              f'or an object of [folder, name], found {str(content)[:60]!r}')
    else:
        names = [line for _, line in read_lines(path)]
        parts = [line.split(maxsplit=1) for line in names]
        by_folder = {part[0]: part[1] for part in parts if len(part) == 2}
        if len(by_folder) == len(names) and sum(folder in by_folder for folder in folders) > len(folders) / 2:
            names = by_folder
    if isinstance(names, list):
        if len(names) != len(folders):
            raise ConfigError(f'source.class_names: {path} has {len(names):,} names, but {images} has '
                              f'{len(folders):,} class folders')
        return names
    if lacking := [folder for folder in folders if folder not in names]:
        raise ConfigError(f'source.class_names: {path} has no name for {len(lacking):,} of {len(folders):,} class '
                          f'folders in {images}, the first of them is {lacking[0]}; it has names for '
                          f'{", ".join(list(names)[:3])}, …')
    return [names[folder] for folder in folders]
