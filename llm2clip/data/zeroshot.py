# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot sets: images with classes, and the prompts for the names of the classes."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

from llm2clip.config import ConfigError, ZeroshotConfig
from llm2clip.data.caption_files import read_lines
from llm2clip.files import FileError
from llm2clip.registry import open_set

if TYPE_CHECKING:
    from llm2clip.evaluation.sets.files import ClassificationSet

__all__ = ['ZeroshotSet', 'zeroshot_set']


class ZeroshotSet(NamedTuple):
    """Images with classes, and prompts with `{}` for the name of a class."""

    dataset: 'ClassificationSet'
    templates: list[str]

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of classes."""
        return not isinstance(self.dataset.labels[0], int)

    @property
    def names(self) -> list[str]:
        """Those of the classes, each once."""
        return list(dict.fromkeys(self.dataset.classes))

    @property
    def prompts(self) -> list[str]:
        """All of them, name by name; those of classes with the same name once."""
        return [template.replace('{}', name) for name in self.names for template in self.templates]


def zeroshot_set(config: ZeroshotConfig, key: str) -> ZeroshotSet:
    """A set, and the prompts of the configuration or else the set's own.

    Args:
        config: Where they are.
        key: Where it stands in the configuration.

    Raises:
        ConfigError: A file or folder is missing or damaged, or there are no prompts.
    """
    dataset = open_set('zeroshot', config.source, f'{key}.source')
    templates = config.templates or dataset.templates
    if templates is None:
        raise ConfigError(f'{key}.templates: required but not set, since {dataset.name} has no prompts of its own')
    return ZeroshotSet(dataset, read_templates(templates, f'{key}.templates'))


def read_templates(path: Union[str, Path], key: str) -> list[str]:
    """The prompts of a text file, with `{}` for the class name, where the file may have `{c}`.

    Raises:
        ConfigError: There is no file, it is empty, or a line has neither.
    """
    try:
        templates = [line.replace('{c}', '{}') for _, line in read_lines(str(path)) if not line.startswith('#')]
    except FileError as error:
        raise ConfigError(f'{key}: {error}') from None
    wrong = [line for line in templates if '{}' not in line]
    if wrong or not templates:
        raise ConfigError(f'{key}: {path}: expected a prompt with {{}} for the class name on each line, got '
                          f'{wrong[0]!r}' if wrong else f'{key}: {path} has no prompt')
    return templates
