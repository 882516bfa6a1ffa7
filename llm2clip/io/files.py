# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Reading and atomic writing of whole files, with errors that name the file."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from llm2clip.errors import FileError

# Texts, since errors of libraries in Rust and C++ have no `errno`.  The last is DuckDB's.
_UNWRITABLE = re.compile('No space left on device|Disk quota exceeded|File too large|fsync failed')
_FAILING = re.compile('Input/output error|Permission denied|Read-only file system')


@contextmanager
def reading(path: Union[str, Path], expected: str) -> Iterator[None]:
    """Turn a library's error about a file into a FileError; errors of this project pass unchanged, and so do
    those of a library that cannot write what it has read."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith('llm2clip.') or _UNWRITABLE.search(str(error)):
            raise
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        reason = ' '.join(reason.split())
        raise FileError(f'cannot be read ({reason}), expected {expected}', path) from error


def read_text(path: Union[str, Path], expected: str = 'a text in UTF-8') -> str:
    """Return a UTF-8 file without its byte order mark; raise a FileError if it is missing or not UTF-8."""
    with reading(path, expected):
        return Path(path).read_text(encoding='utf-8-sig')


def parse_json(text: Union[str, bytes], source: Union[str, Path], kind: type = object) -> Any:
    """Return the value of a JSON text; raise a FileError with `source` if it is not of `kind` (dict or
    list)."""
    expected = {object: 'JSON', dict: 'JSON, an object', list: 'JSON, a list'}[kind]
    with reading(source, expected):
        value = json.loads(text)
    if not isinstance(value, kind):
        raise FileError(f'holds {str(value)[:60]!r}, expected {expected}', source)
    return value


def read_json(path: Union[str, Path], kind: type = object) -> Any:
    """Return the content of a JSON file; arguments and errors as for `parse_json`."""
    return parse_json(read_text(path, 'JSON'), path, kind)


def json_damage(path: Path) -> Optional[str]:
    """Return why a file is not JSON, or None if it is."""
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        return f'{error}, expected JSON'
    return None


def printable(text: str) -> str:
    """Return a text without the control characters and undecodable bytes that file names may contain."""
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]', '\N{REPLACEMENT CHARACTER}', text)


@contextmanager
def writing(path: Union[str, Path]) -> Iterator[None]:
    """Raise a FileError that names what the block writes if the disk is full, fails or may not be
    written."""
    try:
        yield
    except Exception as error:
        reason = _UNWRITABLE.search(str(error))
        named_file = getattr(error, 'filename', getattr(error, 'path', None))
        if named_file is None:  # else it may be one that is read
            reason = reason or _FAILING.search(str(error))
        if reason is None:
            raise
        raise FileError(f'cannot be written ({reason[0]})', path) from error


def flush(path: Union[str, Path]) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of folders on some network file systems
            raise
    finally:
        os.close(descriptor)


def durable_rename(new: Path, path: Path) -> None:
    """Rename a file, or a folder of flushed files; a loss of power leaves the old or the whole new one."""
    with writing(path):
        flush(new)
        new.replace(path)
        flush(path.parent)


def remove_folder(folder: Union[str, Path]) -> None:
    """Remove a folder with its files; a FileError names the folder, where shutil would name a part."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise FileError(f'cannot be removed ({error.strerror})', folder) from error


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Whether an error says that /dev/shm is full, where loader workers keep batches."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return shutil.disk_usage('/dev/shm').free < 2**20
    return re.search(r'shared memory ?\(shm\)|workers are out of shared memory', str(error)) is not None


@contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends without an exception.

    The parent folder is created; the file gets the permissions of the umask; errors are those of `writing`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with writing(path):
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
        durable_rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file atomically; undecodable bytes of file names in the text are replaced."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding='utf-8', errors='replace')


def write_json(path: Union[str, Path], value: Any) -> None:
    """Write indented JSON atomically, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + '\n')
