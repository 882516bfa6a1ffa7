# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sets for classification as CLIP_benchmark lays them out in tars."""

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from llm2clip.config import ConfigError
from llm2clip.config.ranges import FolderName, Text
from llm2clip.data.caption_files import check_text
from llm2clip.data.tars import IMAGES, file_content, tar_samples
from llm2clip.evaluation.sets.files import ClassificationSet, check_file, check_folder, found_in
from llm2clip.files import FileError, read_text, reading
from llm2clip.ranks import once_per_node
from llm2clip.remotes import download

__all__ = ['TarImages', 'clip_benchmark']

_CLASSES, _TEMPLATES, _TYPE = 'classnames.txt', 'zeroshot_classification_templates.txt', 'dataset_type.txt'
# What the type says -> suffix of the file with an image's classes.
_LABELS = {'classification': 'cls', 'multilabel': 'npy'}


@dataclass(frozen=True)
class TarImages:
    """Reads images in tars by position."""

    places: Sequence[tuple[str, int, int]]
    """Tar, first byte and length of each."""

    def __call__(self, position: int) -> bytes:
        path, start, length = self.places[position]
        with reading(path, 'a tar'), open(path, 'rb') as file:
            file.seek(start)
            return file.read(length)


def clip_benchmark(local: Text, remote: Optional[Text] = None, split: FolderName = 'test') -> ClassificationSet:
    """One of the sets at https://huggingface.co/clip-benchmark, or any that
    ``clip_benchmark.webdataset_builder.convert_dataset`` of CLIP_benchmark 1.6 wrote, read as it reads them::

        classnames.txt                            one class per line; a class may have an empty name
        zeroshot_classification_templates.txt     one prompt per line, with {c} for the class; not in every set
        dataset_type.txt                          `multilabel` where an image has any number of classes
        test/nshards.txt                          how many tars there are
        test/0.tar, test/1.tar, …                 0001.webp (png, jpg, jpeg) with 0001.cls, the position of its class;
                                                  or with 0001.npy, a 1 or a 0 per class

    Args:
        local: Folder of the set, or where its files are kept once they are downloaded.
        remote: Where files that are not in `local` are, any place that Streaming's downloaders know, such as
            ``hf://datasets/clip-benchmark/wds_cars``.
        split: Which of the splits.

    Raises:
        ConfigError: A folder or file is missing, or the set is for retrieval.
        FileError: A file is damaged, there are more or fewer tars than ``nshards.txt`` says, or a sample has no image,
            or no class that has a name.
    """
    if remote is not None:
        once_per_node(lambda: _fetch(Path(local), remote, split), f'files of {remote} in {local}')
    check_folder(local, 'local', local)
    check_file(local, 'local', f'{local}/{_CLASSES}')
    classes = [check_text(line.strip(), f'{local}/{_CLASSES}')
               for line in read_text(f'{local}/{_CLASSES}').splitlines()]
    path = Path(local, _TYPE)
    kind = read_text(path).strip().lower() if path.is_file() else 'classification'
    if kind not in _LABELS:
        raise ConfigError(f'{path}: says {kind!r}, expected a set for classification: {" or ".join(_LABELS)}')
    label_suffix = _LABELS[kind]

    def place_or_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Union[bytes, tuple[int, int]]:
        """Where an image is in its tar, or what is in another file."""
        if member.name.lower().endswith(IMAGES):
            return member.offset_data, member.size
        return file_content(tar, member)

    ids, labels, places = [], [], []
    for path in _tars(local, split):
        for sample in tar_samples(path, place_or_label, 'r:'):
            where = f'{path}: sample {sample["__key__"]!r}'
            image = next((name for name in IMAGES if name in sample), None)
            if image is None:
                raise FileError(f'{where}: has no image, expected one in {", ".join(IMAGES)}')
            if label_suffix not in sample:
                raise FileError(f'{where}: has no {label_suffix}, expected what the classes of the image are')
            label = _position if label_suffix == 'cls' else _ones_and_zeros
            labels.append(label(sample[label_suffix], classes, f'{where}: {label_suffix}'))
            ids.append(f'{path}/{sample["__key__"]}.{image}')
            places.append((path, *sample[image]))
    if not ids:
        raise FileError(f'{local}/{split}: has no images in its tars')
    templates = f'{local}/{_TEMPLATES}'
    return ClassificationSet(local, ids, labels, classes, TarImages(places),
                             templates if Path(templates).is_file() else None)


def _fetch(local: Path, remote: str, split: str) -> dict[str, int]:
    """Download what is not there; all files with their sizes."""
    files = {}

    def fetch(name: str, required: bool = True) -> None:
        path = local / name
        with reading(f'{remote}/{name}', 'a file that can be downloaded'):
            if not path.is_file() and not download(f'{remote}/{name}', path) and required:
                raise ConfigError(f'source.remote: there is no {remote}/{name}')
        if path.is_file():
            files[name] = path.stat().st_size

    if not (local / _CLASSES).is_file():  # otherwise, it is known whether there are these
        fetch(_TYPE, required=False)
        fetch(_TEMPLATES, required=False)
    fetch(_CLASSES)
    fetch(f'{split}/nshards.txt')
    for number in range(_tar_count(f'{local}/{split}/nshards.txt')):
        fetch(f'{split}/{number}.tar')
    return files


def _tar_count(path: str) -> int:
    with reading(path, 'the number of tars'):
        count = int(read_text(path))
    if count < 1:
        raise FileError(f'{path}: says {count}, expected at least one tar')
    return count


def _tars(local: str, split: str) -> list[str]:
    """The tars of a split, all of them and no other."""
    path = f'{local}/{split}/nshards.txt'
    check_file(local, 'split', path)
    names = [f'{number}.tar' for number in range(_tar_count(path))]
    there = {name for name in os.listdir(f'{local}/{split}') if name.endswith('.tar')}
    if missing := [name for name in names if name not in there]:
        raise FileError(f'{path}: says {len(names):,} tars, but there is no {local}/{split}/{missing[0]}; '
                        f'{found_in(Path(local, split))}')
    if more := sorted(there - {*names}):
        raise FileError(f'{path}: says {len(names):,} tars, but there is also {local}/{split}/{more[0]}')
    return [f'{local}/{split}/{name}' for name in names]


def _position(data: bytes, classes: Sequence[str], where: str) -> int:
    with reading(where, 'the position of a class'):
        position = int(data)
    if not 0 <= position < len(classes):
        raise FileError(f'{where}: is {position}, expected 0 to {len(classes) - 1}, since {_CLASSES} has '
                        f'{len(classes):,} names')
    return position


def _ones_and_zeros(data: bytes, classes: Sequence[str], where: str) -> list[int]:
    expected = f'a 1 or a 0 for each of the {len(classes):,} names in {_CLASSES}'
    with reading(where, expected):
        values: Any = np.load(io.BytesIO(data), allow_pickle=False)
        if values.shape != (len(classes),) or not np.isin(values, (0, 1)).all():
            raise FileError(f'{where}: holds {values.dtype} of shape {values.shape}, expected {expected}')
        return values.astype(int).tolist()
