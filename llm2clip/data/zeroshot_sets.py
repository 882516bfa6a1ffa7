# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot sets: images with classes, and prompt templates for the class names."""

import itertools
from pathlib import Path
from typing import NamedTuple, Union

from llm2clip.config import ZeroshotConfig
from llm2clip.data.caption_files import read_lines
from llm2clip.data.classification_sets import ClassificationSet
from llm2clip.errors import ConfigError, under
from llm2clip.registry import open_set


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
