# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folders that appear under their name only when everything is in them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

__all__ = ['complete_folder']


@contextmanager
def complete_folder(folder: Union[str, Path]) -> Iterator[Path]:
    """A temporary folder to write into, which replaces `folder` when the block ends without an exception."""
    folder = Path(folder)
    partial = folder.with_name(f'{folder.name}.tmp')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
