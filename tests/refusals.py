# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Errors that tests expect, by the key or the file that they name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

import pytest

from llm2clip.errors import ConfigError, FileError


@contextmanager
def refused_at(place: Union[str, Path], words: str = '') -> Iterator[None]:
    """Expect a ConfigError with the key `place` or a FileError with the path `place`, which says `words`."""
    with pytest.raises((ConfigError, FileError), match=words) as error:
        yield
    found = error.value.key if isinstance(error.value, ConfigError) else error.value.path
    assert found == str(place), error.value
