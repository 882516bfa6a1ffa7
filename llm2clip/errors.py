# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Errors that tell users what to change, and the context that adds the key of the configuration to them."""

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Union


class ConfigError(ValueError):
    """Configuration that cannot be used.  As a text, ``<key> (<place>): <message>``.

    Args:
        message: What is wrong, and what was expected.
        key: Dotted key, relative to the blocks of `under` that raise the error.
        is_absolute: Whether `key` is complete, so that `under` adds nothing to it.

    Attributes:
        place: File and line of the key, or the command line; empty if unknown.
    """

    def __init__(self, message: str, key: str = '', is_absolute: bool = False) -> None:
        super().__init__(message)
        self.key = key
        self.is_absolute = is_absolute
        self.place = ''

    def __str__(self) -> str:
        key = f'{self.key} ({self.place})' if self.place else self.key
        return f'{key}: {self.args[0]}' if key else self.args[0]


class FileError(ValueError):
    """A file that cannot be used.  As a text, ``<path>: <message>``."""

    def __init__(self, message: str, path: Union[str, Path] = '') -> None:
        super().__init__(message)
        self.path = str(path)

    def __str__(self) -> str:
        return f'{self.path}: {self.args[0]}' if self.path else self.args[0]


@contextmanager
def under(key: str) -> Iterator[None]:
    """Put `key` before the key of a ConfigError that the block raises.

    An error with the key ``local`` that leaves ``under('train_data.streams.cc3m')`` has the key
    ``train_data.streams.cc3m.local``.  An index such as ``[2]`` is added without a dot.
    """
    try:
        yield
    except ConfigError as error:
        if not error.is_absolute:
            error.key = f'{key}.{error.key}'.strip('.').replace('.[', '[')
        raise


def refuse(rules: Sequence[tuple[str, object, str]]) -> None:
    """Raise the ConfigError of the first rule (key, whether it is broken, message) that is broken."""
    for key, is_broken, message in rules:
        if is_broken:
            raise ConfigError(message, key=key)


def nearest(name: str, names: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the most similar valid one, or all of them."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f'did you mean {near[0]!r}?'
    return f'valid are {", ".join(sorted(names))}'


def missing_extra(subject: str, extra: str, error: ImportError) -> ConfigError:
    """Return the error of a part that needs the packages of an extra of this project."""
    return ConfigError(f'{subject} needs the extra {extra} ({error}): '
                       f".uv/bin/uv sync --locked --inexact --extra {extra}, or pip install -e '.[{extra}]'")
