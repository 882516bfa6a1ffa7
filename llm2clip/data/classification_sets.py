# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Classification sets: ImageNet-style folders, and tars in the layout of CLIP_benchmark; for zero-shot
classification, with prompt templates for the class names."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from llm2clip.config import ZeroshotConfig
from llm2clip.config.ranges import FolderName, Text
from llm2clip.data.caption_files import check_text, read_lines
from llm2clip.data.images import ImageFiles
from llm2clip.data.tars import IMAGES, tar_samples
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.io.files import read_json, read_text, reading
from llm2clip.registry import open_set

# Folder of ImageNet, a WordNet id or a number.  Two of its classes may have the same name, as `crane`.
_CODE = re.compile(r'n?\d+')
_CLASSES = 'classnames.txt'
_TEMPLATES = 'zeroshot_classification_templates.txt'


def _position(data: bytes, num_classes: int) -> int:
    """Position of the class of an image."""
    position = int(data)
    if not 0 <= position < num_classes:
        raise ValueError(f'{position} is not the position of a line of {_CLASSES}')
    return position


def _ones_and_zeros(data: bytes, num_classes: int) -> list[int]:
    """For each class, whether an image has it."""
    values: Any = np.load(io.BytesIO(data), allow_pickle=False)
    if values.shape != (num_classes,) or not np.isin(values, (0, 1)).all():
        raise ValueError(f'{values.dtype} of shape {values.shape}, not a 1 or a 0 per line of {_CLASSES}')
    return values.astype(int).tolist()


# Content of `dataset_type.txt` -> suffix of the label files, and what reads them.
_LABELS = {'classification': ('cls', _position), 'multilabel': ('npy', _ones_and_zeros)}


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


def imagenet_folder(images: str, class_names: Optional[str] = None) -> ClassificationSet:
    """Images in one subfolder per class, in the order of the subfolder names; also used for linear probes.

    ImageNet's validation images (https://image-net.org, ILSVRC2012, for research only) come in one folder.
    This script moves them into class folders:
    https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh .

    Args:
        images: Folder that contains the class folders.
        class_names: File with the class names; unset, the folder names.  ``.json``: an object from folder to
            name, or a list in folder order.  Text: one name per line in folder order.  ``_`` stands for a
            space.

    Raises:
        ConfigError: `images` has no subfolders, one is empty, or the names do not fit.
    """
    folders = sorted(path.name for path in Path(images).glob('[!.]*/'))
    if not folders:
        raise ConfigError(f'{images} has no subfolders, expected one per class', 'images')
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        paths = sorted(f'{folder}/{path.name}' for path in Path(images, folder).glob('[!.]*'))
        if not paths:
            raise ConfigError(f'{images}/{folder} has no files, expected the images of a class', 'images')
        files += paths
        labels += [label] * len(paths)
    source, classes = images, folders
    if class_names is not None:
        source, classes = class_names, _read_names(class_names, folders)
    classes = [name.replace('_', ' ') for name in classes]
    commonest, count = Counter(classes).most_common(1)[0]
    if count > 1 and not all(map(_CODE.fullmatch, folders)):
        raise ConfigError(f'{count} classes in {source} have the name {commonest!r}', 'class_names')
    return ClassificationSet(images, files, labels, classes, ImageFiles(images, files))


def _read_names(path: str, folders: list[str]) -> list[str]:
    """Class name of each folder."""
    if path.endswith('.json'):
        names: Any = read_json(path)
    else:
        names = [line for _, line in read_lines(path)]
        words = map(str.split, names)
        first_words = {first for first, *others in words if others}
        if len(first_words.intersection(folders)) > len(folders) / 2:
            raise ConfigError(f'{path}: each line may be a name, or a folder and its name; expected a .json '
                              'file with an object from folder to name', 'class_names')
    with reading(path, f'one name for each of the {len(folders):,} class folders'):
        if isinstance(names, dict):
            names = [names[folder] for folder in folders]
        if len(names) != len(folders):
            raise ValueError(f'{len(names):,} values')
        return [check_text(name, path) for name in names]


@dataclass(frozen=True)
class TarImages:
    """Reader of images in tars by position; `places` has the tar, byte offset and length of each image."""

    places: Sequence[tuple[str, int, int]]

    def __call__(self, position: int) -> bytes:
        path, start, length = self.places[position]
        with reading(path, 'a tar'), open(path, 'rb') as file:
            file.seek(start)
            return file.read(length)


def clip_benchmark(local: Text, split: FolderName = 'test') -> ClassificationSet:
    """A set from https://huggingface.co/clip-benchmark, or written by CLIP_benchmark 1.6
    (``clip_benchmark.webdataset_builder.convert_dataset``), read as CLIP_benchmark reads it::

        classnames.txt                            one class per line; class names may be empty
        zeroshot_classification_templates.txt     optional; one prompt per line, with {c} for the class
        dataset_type.txt                          `multilabel` if an image has any number of classes
        test/nshards.txt                          number of tars
        test/0.tar, test/1.tar, …                 0001.webp (png, jpg, jpeg) with 0001.cls, the position of
                                                  its class; or with 0001.npy, a 1 or a 0 per class

    Args:
        local: Folder of the set, for example downloaded by ``hf download clip-benchmark/wds_cars
            --repo-type dataset --local-dir data/wds/cars``.
        split: Split to read.

    Raises:
        FileError: A file is missing or damaged, the set is for retrieval, or a sample has no image or no
            class listed in ``classnames.txt``.
    """
    classes = [line.strip() for line in read_text(f'{local}/{_CLASSES}').splitlines()]
    kind = 'classification'
    type_file = Path(local, 'dataset_type.txt')
    if type_file.is_file():
        kind = read_text(type_file).strip().lower()
    if kind not in _LABELS:
        raise FileError(f'says {kind!r}, expected {" or ".join(_LABELS)}', type_file)
    suffix, read_label = _LABELS[kind]
    counted = f'{local}/{split}/nshards.txt'
    with reading(counted, 'the number of tars'):
        num_tars = int(read_text(counted))
    ids, labels, places = [], [], []
    for path in (f'{local}/{split}/{i}.tar' for i in range(num_tars)):
        for sample in tar_samples(path, [suffix], image_places=True):
            where = f'{path}: sample {sample["__key__"]!r}'
            with reading(where, f'an image in {", ".join(IMAGES)}, and its classes in {suffix}'):
                image = next(name for name in IMAGES if name in sample)
                labels.append(read_label(sample[suffix], len(classes)))
            ids.append(f'{path}/{sample["__key__"]}.{image}')
            places.append((path, *sample[image]))
    templates = f'{local}/{_TEMPLATES}'
    if not Path(templates).is_file():
        templates = None
    return ClassificationSet(local, ids, labels, classes, TarImages(places), templates)


class ZeroshotSet(NamedTuple):
    """Images with classes, and prompt templates with `{}` for the class name."""

    dataset: ClassificationSet
    templates: list[str]

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several classes or none."""
        return not isinstance(self.dataset.labels[0], int)

    @property
    def names(self) -> list[str]:
        """Class names without duplicates."""
        return list(dict.fromkeys(self.dataset.classes))

    @property
    def prompts(self) -> list[str]:
        """Prompts of all class names, name by name."""
        pairs = itertools.product(self.names, self.templates)
        return [template.replace('{}', name) for name, template in pairs]


def zeroshot_set(config: ZeroshotConfig, key: str) -> ZeroshotSet:
    """Open a zero-shot set with the prompt templates of the configuration, or else its own.

    Args:
        config: Source of the set and file of the templates.
        key: Configuration key of `config`, for error messages.

    Raises:
        ConfigError: The set cannot be opened, or there are no prompts.
        FileError: A file is missing or damaged.
    """
    dataset = open_set('zeroshot', config.source, f'{key}.source')
    templates = config.templates or dataset.templates
    with under(f'{key}.templates'):
        if templates is None:
            raise ConfigError(f'required but not set, since {dataset.name} has no prompts of its own')
        return ZeroshotSet(dataset, read_templates(templates))


def read_templates(path: Union[str, Path]) -> list[str]:
    """Return the prompt templates in the lines of a text file.

    `{c}` becomes `{}`, and lines that start with # are skipped.

    Raises:
        ConfigError: There is no template, or a line has no placeholder.
        FileError: The file is missing or damaged.
    """
    templates: list[str] = []
    for where, line in read_lines(str(path)):
        if not line.startswith('#'):
            templates.append(line.replace('{c}', '{}'))
            if '{}' not in templates[-1]:
                raise ConfigError(f'{where}: {line!r}, expected a prompt with {{}} for the class name')
    if not templates:
        raise ConfigError(f'{path} has no prompt')
    return templates
