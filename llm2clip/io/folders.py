# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Output folders: a lock for one recipe and one process at a time, and atomic replacement as a whole."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional, Union

from filelock import FileLock, Timeout

from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import durable_rename, flush, remove_folder, writing

MANIFEST = 'MANIFEST'
# Hidden file with the name of the recipe that adds files to a folder over time.
_RECORD = '.llm2clip'
# Files that recipes add to a finished folder, and temporary ones that a killed process left.
_ADDED_NAMES = ('config.yaml', 'seconds.json')
_ADDED = re.compile(r'(config\.yaml|seconds\.json)(\.\d+\.tmp)?')
CACHE_LOCK = '.in_use'
"""Lock file in the cache of a remote dataset."""
# Temporary names of atomic_write, OutputFolder.commit, download, safetensors and check_shared.
_TEMPORARY = re.compile(r'.+\.\d+\.tmp|\.staging\.\d+\..+|\..+\.\d+\.part|\.tmp\w{6}|\.[0-9a-f]{32}')
LOCK_SECONDS = 60.0
"""Maximum wait for a lock, since a killed process holds it until the system has freed its memory."""


def inside(folder: Union[str, Path], name: str, source: str, also: Iterable[str] = ()) -> Path:
    """Return the path of a file that the data in `source` name, in a folder or in one of those in `also`.

    Raises:
        FileError: It is outside: by ``..``, as an absolute path, or by a symbolic link.
    """
    path = Path(folder, name)
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in (folder, *also)):
        raise FileError(f'the path {name!r} leads to {real}, expected one inside {folder}', source)
    return path


@contextmanager
def locked(
    path: Union[str, Path], folder: Union[str, Path], timeout: float = LOCK_SECONDS
) -> Iterator[None]:
    """Hold a lock file, which the system releases when this process ends; forked processes do not hold it.

    A ConfigError that names the locked `folder` is raised if another process holds it for `timeout` seconds;
    -1 waits for it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    if not lock.is_locked:
        print(f'waiting for another process, which holds {path}', file=sys.stderr, flush=True)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise ConfigError(f'{folder}: another process is writing there and holds {path}, expected to be '
                              'the only one; wait for it, stop it, or choose another folder') from None
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of killed processes from a folder that this process has locked.

    Folders inside that other processes may have locked are left alone.
    """
    for root, folders, files in os.walk(folder):
        for name in [*folders]:
            path = Path(root, name)
            target = path.with_suffix('')
            locks = (path / _RECORD, path / CACHE_LOCK, target.with_name(f'.{target.name}.lock'))
            if any(map(Path.exists, locks)):
                folders.remove(name)
            elif _TEMPORARY.fullmatch(name):
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == '.tmp' and {*os.listdir(path)} <= {'new', 'old'}:
                clear_work(target)
        for name in filter(_TEMPORARY.fullmatch, files):
            Path(root, name).unlink(missing_ok=True)


def _remove_partial_files(folder: Path, names: Sequence[str]) -> None:
    """Remove what killed processes left of some files; all others in the folder are the user's."""
    for name in names:
        for path in folder.glob(f'{name}.*.tmp'):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextmanager
def lock_output(
    folder: Union[str, Path], recipe: str, names: Optional[Sequence[str]] = None,
    part: Optional[int] = None,
) -> Iterator[None]:
    """Lock a folder to which one recipe adds files over time.

    The folder is created if it does not exist, and removed again if the block leaves no file there.  What
    killed processes left in it is removed, unless others share it.

    Args:
        folder: Output folder of the recipe.
        recipe: Its name, which a hidden file records.
        names: Files that the recipe writes; unset, all in the folder.
        part: Index of this process among those that share the folder; unset, there are no others.

    Raises:
        ConfigError: The folder has files that the recipe did not write, or another process writes there.
    """
    folder = Path(os.path.abspath(folder))
    record = folder / _RECORD
    is_new = not folder.exists()
    if not record.is_file():
        present = sorted(path.name for path in folder.glob('[!.]*') if names is None or path.name in names)
        if present:
            raise ConfigError(f'{folder}: holds {", ".join(present[:5])}, which {recipe} did not write '
                              f'(there is no {_RECORD} that says so), expected an empty folder or its own')
    lock = folder / f'{_RECORD}.{part}' if part else record
    with locked(lock, folder):
        record.touch()
        owner = record.read_text().rpartition('\n')[0]  # empty if a killed process has not written the end
        if owner not in ('', recipe):
            raise ConfigError(f'{folder}: was written by {owner}, expected an empty folder or one that '
                              f'{recipe} wrote')
        # In place, because the file may be the lock, and the same bytes again, so that a kill tears nothing.
        with writing(record), record.open('r+') as file:
            file.write(f'{recipe}\n')
            file.truncate()
        if owner and part is None:  # else nothing in the folder is of this recipe, or others share it
            if names is None:
                _remove_leftovers(folder)
            else:
                _remove_partial_files(folder, [*names, *_ADDED_NAMES])
        try:
            yield
        finally:
            if part:
                lock.unlink(missing_ok=True)
            elif all(path == record or path.is_dir() for path in folder.rglob('*')):
                record.unlink(missing_ok=True)
                if is_new:
                    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> dict[str, str]:
    """Return name -> line in the manifest, with the size, of each file except the manifest itself."""
    lines: dict[str, str] = {}
    for path in sorted(folder.rglob('*')):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and (path.is_symlink() or not path.is_dir()):
            lines[name] = f'{path.lstat().st_size} {name}'
    return lines


def check_replaceable(folder: Union[str, Path], kind: str) -> None:
    """Raise a ConfigError if a folder has content that `atomic_folder` did not write for the same kind."""
    folder = Path(os.path.abspath(folder))
    present: list[str] = []
    if folder.exists():
        present = sorted(os.listdir(folder))
    manifest = folder / MANIFEST
    written: list[str] = []
    if manifest.is_file():
        written = manifest.read_text(errors='replace').splitlines()
    is_ours = written[:1] == [f'{kind}, written by llm2clip']
    fault = ''
    if present and not is_ours:
        fault = f'it has no {MANIFEST} that says that it is one (in it: {", ".join(present[:5])})'
    else:
        for name, line in _files(folder).items():
            if line not in written and not _ADDED.fullmatch(name):
                fault = f'{name} has been put into it or changed'
    if fault:
        raise ConfigError(f'{folder} is there already and is not replaced by a new {kind}: {fault}. Choose '
                          'another folder, or remove that one')
    _temporary_folder(folder)


def _temporary_folder(folder: Path) -> Path:
    """Return the path of the temporary folder of `atomic_folder`; a ConfigError if it has other content."""
    work = folder.with_name(f'{folder.name}.tmp')
    if not {*work.glob('*')} <= {work / 'new', work / 'old'}:
        raise ConfigError(f'{work} is in the way of what is written there first; move it elsewhere')
    return work


def clear_work(folder: Path) -> Path:
    """Remove what a killed `atomic_folder` left beside `folder`; return the path of its temporary folder.
    A ConfigError if something else is there."""
    work = _temporary_folder(folder)
    old = work / 'old'  # the replaced folder
    if old.exists() and not folder.exists():  # killed between the two renames
        old.replace(folder)
    shutil.rmtree(work, ignore_errors=True)
    return work


@contextmanager
def atomic_folder(folder: Union[str, Path], kind: Optional[str] = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the block ends without an exception.

    An existing folder stays until then, even if the process is killed.  Files get the umask's permissions.

    Args:
        folder: Final path.
        kind: Its content, in words.  A manifest lists the files, and `check_replaceable` decides whether an
            existing folder may be replaced.  Unset: any folder is replaced, and there is no manifest.
    """
    folder = Path(os.path.abspath(folder))
    if kind is not None:
        check_replaceable(folder, kind)
    work = clear_work(folder)
    new = work / 'new'
    new.mkdir(parents=True)
    mode = new.stat().st_mode & 0o777  # of the umask; safetensors and temporary files have a stricter one
    try:
        with writing(folder):
            yield new
            if kind is not None:
                lines = [f'{kind}, written by llm2clip', *_files(new).values()]
                (new / MANIFEST).write_text('\n'.join(lines) + '\n')
                check_replaceable(folder, kind)
            for path in new.rglob('*'):
                path.chmod(mode if path.is_dir() else mode & 0o666)
                flush(path)
    except BaseException:
        shutil.rmtree(work)
        raise
    if folder.exists():
        folder.replace(work / 'old')
    durable_rename(new, folder)
    remove_folder(work)
