# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Hashes of teachers' folders, kept for the next start: a large LLM takes minutes to read from a network's disk."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional, Union

import xxhash

from llm2clip.files import FileError, read_json, write_json
from llm2clip.remote_code.checks_llm2clip import TEACHER_SUFFIXES

__all__ = ['CACHE_VARIABLE', 'hash_files']

CACHE_VARIABLE = 'LLM2CLIP_CACHE'
# What changed so short a time ago may change again without another time stamp: a second on some network disks.
_SETTLED_NS = 2_000_000_000


def hash_files(folder: Union[str, Path], leave_out: str = '') -> str:
    """Hash of the weights, tokenizer, chat template and configurations in a folder.

    It is kept in ``$LLM2CLIP_CACHE``, by default ``~/.cache/llm2clip``, with the name, size, inode and times of every
    file, and taken from there while all of these are what they were.  So a file that changes is read again, unless
    somebody sets back the clock and gives the file its old times.  The kept hashes are no more than a convenience:
    what is damaged or cannot be written counts as not there.

    Args:
        folder: Of a model.
        leave_out: Name of a file that does not count.

    Raises:
        OSError: A file cannot be read.
    """
    folder = Path(folder).absolute()
    paths = sorted(path for path in folder.rglob('*') if path.suffix in TEACHER_SUFFIXES and path.name != leave_out)
    seen, kept = _states(paths), _cache_file(folder, leave_out)
    if kept is not None and (known := _known(kept, seen)) is not None:
        return known
    digest = xxhash.xxh64()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix())
        with path.open('rb') as file:
            while block := file.read(1 << 24):
                digest.update(block)
    result = digest.hexdigest()
    newest = max((times for _, _, _, *both in seen for times in both), default=0)
    if kept is not None and seen == _states(paths) and newest < time.time_ns() - _SETTLED_NS:
        with suppress(OSError, FileError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {'files': seen, 'hash': result})
    return result


def _states(paths: Sequence[Path]) -> list[list[Any]]:
    """What changes when a file does: path, size, inode, time of the content and time of the inode, in nanoseconds."""
    states = [path.stat() for path in paths]
    return [[os.fsencode(path).hex(), state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
            for path, state in zip(paths, states)]


def _cache_file(folder: Path, leave_out: str) -> Optional[Path]:
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    root = Path(os.environ.get(CACHE_VARIABLE) or os.path.join(cache, 'llm2clip'))
    name = xxhash.xxh64(os.fsencode(folder) + b'\0' + os.fsencode(leave_out)).hexdigest()
    return root / 'hashes' / f'{name}.json' if root.is_absolute() else None


def _known(path: Path, seen: list[list[Any]]) -> Optional[str]:
    with suppress(FileError):
        kept = read_json(path, dict)
        if kept.get('files') == seen and isinstance(kept.get('hash'), str) and len(kept['hash']) == 16:
            return kept['hash']
    return None
