# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments that data sources and evaluation sets have in common, made before they read anything."""

from collections.abc import Iterable, Mapping
from typing import Any, Optional

from llm2clip.config import ConfigError
from llm2clip.folders import check_name

__all__ = ['HELDOUT', 'check_count', 'check_keys', 'check_share', 'check_split']

HELDOUT = 'heldout'
"""Name of the split of what is held out."""


def check_count(value: Any, key: str, least: int = 0, most: Optional[int] = None) -> None:
    """Raise a ConfigError that names `key` unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or most is not None and value > most:
        upper = '' if most is None else f' to {most:,}'
        raise ConfigError(f'{key}: got {value!r}, expected a whole number from {least}{upper}')


def check_share(value: Any, key: str) -> None:
    """Raise a ConfigError that names `key` unless `value` is a share, from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f'{key}: got {value!r}, expected a share, from 0 (none) to below 1')


def check_split(split: Any, heldout: Any = 0, seed: Any = 0) -> None:
    """Raise a ConfigError unless a split can have this name, also beside one that is held out, by this seed."""
    check_name(split, 'source.split')
    if heldout and split == HELDOUT:
        raise ConfigError(f'source.split: {split!r} is the name of the held-out split; give the other one another name')
    check_count(seed, 'source.seed', most=2**64 - 1)


def check_keys(keys: Any, where: str) -> None:
    """Raise a ConfigError that names `where` unless these are names of captions."""
    if isinstance(keys, str) or not isinstance(keys, Iterable) or \
            not all(isinstance(key, str) and key.isprintable() and key for key in keys):
        shown = list(keys) if isinstance(keys, Mapping) else keys
        raise ConfigError(f'{where}: got {shown!r}, expected names of captions')
