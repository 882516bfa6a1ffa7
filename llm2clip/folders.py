# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folders that appear under their name only when everything is in them, here and in an object store."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union
from urllib.parse import urlparse

from llm2clip.config import ConfigError
from llm2clip.files import complete_file

__all__ = ['MANIFEST', 'OutputFolder', 'check_replaceable', 'complete_folder', 'describe_folder', 'is_missing']

MANIFEST = 'MANIFEST'
_ATTEMPTS = 5
_SHOWN = 5
# What recipes add to a folder that they wrote, and what is left of such a file by a kill while it was written.
_OWN_FILES = re.compile(r'(config\.yaml|seconds\.json)(\.\d+\.tmp)?')


def check_replaceable(folder: Union[str, Path], kind: str) -> None:
    """Make sure that nothing is lost if `folder` is replaced by a new one of this kind.

    Raises:
        ConfigError: It holds anything that `complete_folder` did not write there for the same kind; names it.  Or a
            folder of somebody else's has the name of the temporary one.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_dir():
        inside = sorted(path.name for path in folder.iterdir())
        fault = _fault(folder, kind) if inside else None
        contents = ', '.join(inside[:_SHOWN]) + (f' and {len(inside) - _SHOWN:,} more' if inside[_SHOWN:] else '')
        fault = fault and f'{fault} (in it: {contents})'
    else:
        fault = 'it is no folder' if folder.exists() else None
    if fault is not None:
        raise ConfigError(f'{folder} is there already and is not replaced by a new {kind}: {fault}. '
                          'Choose another folder, or remove that one')
    work = _work_folder(folder)
    if work.exists() and not (work.is_dir() and {*os.listdir(work)} <= {'new', 'old'}):
        raise ConfigError(f'{work} is in the way of what is written there first; move it elsewhere')


def _work_folder(folder: Path) -> Path:
    """Where ``new`` is written, and ``old`` is kept while one takes the place of the other."""
    return folder.with_name(f'{folder.name}.tmp')


def describe_folder(folder: Union[str, Path]) -> str:
    """Its path, size and contents, for a message."""
    size = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
    names = sorted(f'{path.name}/' if path.is_dir() else path.name for path in Path(folder).iterdir())
    return f'{folder} ({size / 1e6:,.1f} MB): {", ".join(names)}'


def _fault(folder: Path, kind: str) -> Optional[str]:
    """Why the contents of a folder may not be thrown away, by the manifest that was written with them."""
    manifest = folder / MANIFEST
    lines = manifest.read_text(errors='replace').splitlines() if manifest.is_file() else []
    if lines[:1] != [_title(kind)]:
        return f'it has no {MANIFEST} that says that it is one'
    written = dict(line.split(' ', 1)[::-1] for line in lines[1:] if ' ' in line)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*')
             if path.is_symlink() or not path.is_dir()}
    others = sorted(name for name in found.keys() - written.keys() - {MANIFEST} if not _OWN_FILES.fullmatch(name))
    if others:
        return f'{others[0]} has been put into it'
    changed = [name for name, size in written.items() if name in found and str(found[name].stat().st_size) != size]
    return f'{changed[0]} has been changed' if changed else None


def _title(kind: str) -> str:
    return f'{kind}, written by llm2clip'


@contextmanager
def complete_folder(folder: Union[str, Path], kind: Optional[str] = None) -> Iterator[Path]:
    """A temporary folder to write into, which replaces `folder` when the block ends without an exception.

    Its files get the permissions that the umask gives to new files, whoever wrote them.

    Args:
        folder: Where it is to appear.  What is there stays until then, also when the process is killed.
        kind: What it is, in words.  A manifest in it lists its files, and `folder` is replaced only if it is empty or
            of the same kind and as it was written.  Unset: whatever is there is replaced, and there is no manifest.

    Raises:
        ConfigError: `folder` may not be replaced.
    """
    folder = Path(os.path.abspath(folder))
    if kind is not None:
        check_replaceable(folder, kind)
    work = _work_folder(folder)
    new, old = work / 'new', work / 'old'
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.replace(folder)
    shutil.rmtree(work, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if kind is not None:
            _write_manifest(new, kind)
            check_replaceable(folder, kind)
        _follow_umask(new)
    except BaseException:
        shutil.rmtree(work)
        raise
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(work)


def _write_manifest(folder: Path, kind: str) -> None:
    files = sorted(path for path in folder.rglob('*') if not path.is_dir())
    lines = [_title(kind), *(f'{path.stat().st_size} {path.relative_to(folder).as_posix()}' for path in files)]
    (folder / MANIFEST).write_text('\n'.join(lines) + '\n')


def _follow_umask(folder: Path) -> None:
    """Safetensors and temporary files can be read by their owner only."""
    mode = folder.stat().st_mode & 0o777  # of a new folder, what the umask leaves
    for path in folder.rglob('*'):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


class OutputFolder:
    """A folder that is written here and uploaded, file by file, to its remote if it has one.

    Args:
        local: The folder.
        remote: Where its files go as well, any place that Streaming's uploaders know; unset, nowhere.

    Raises:
        ConfigError: Streaming cannot write to such a remote.
    """

    def __init__(self, local: Union[str, Path], remote: Optional[str] = None) -> None:
        self.local = Path(local)
        self.remote = remote
        if remote is not None:
            # Streaming takes seconds to import, which only those with a remote should wait for.
            from streaming.base.storage.upload import UPLOADERS
            if urlparse(remote).scheme not in UPLOADERS:
                raise ConfigError(f'Streaming cannot write to {remote}')

    def __str__(self) -> str:
        return str(self.local) if self.remote is None else f'{self.local} (and {self.remote})'

    def fetch(self, name: str) -> bool:
        """Whether the file `name` is here, after downloading it if only the remote has it."""
        path = self.local / name
        if path.is_file() or self.remote is None:
            return path.is_file()
        from streaming.base.storage import CloudDownloader
        partial = path.with_name(f'{path.name}.{os.getpid()}.part')
        try:
            CloudDownloader.direct_download(os.path.join(self.remote, name), str(partial))
        except Exception as error:
            if is_missing(error):
                return False
            raise
        partial.replace(path)
        return True

    def publish(self, *names: str, keep: bool = True) -> None:
        """Upload files, in this order; without `keep`, remove them here afterwards."""
        if self.remote is not None:
            _upload(self.local, self.remote, names, keep)

    def commit(self, name: str, text: str) -> None:
        """Write a small file that says that something is complete: what is here is in the remote too."""
        staging = self.local / f'.staging.{os.getpid()}'
        partial, path = staging / name, self.local / name
        partial.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        if self.remote is not None:
            _upload(staging, self.remote, [name], keep=True)
        partial.replace(path)
        shutil.rmtree(staging)


def _upload(folder: Path, remote: str, names: Iterable[str], keep: bool) -> None:
    if urlparse(remote).scheme:
        from streaming.base.storage import CloudUploader
        uploader = CloudUploader.get((str(folder), remote), keep_local=keep, retry=_ATTEMPTS, exist_ok=True)
        for name in names:
            uploader.upload_file(name)
        return
    for name in names:  # Streaming's uploader makes no folders, and a reader could see half a file
        target = Path(remote, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(target) as partial:
            shutil.copyfile(folder / name, partial)
        if not keep:
            (folder / name).unlink()


def is_missing(error: Exception) -> bool:
    """Whether a download failed since the remote has no such file, or lets nobody know."""
    response = getattr(error, 'response', None)
    code = response.get('Error', {}).get('Code') if isinstance(response, dict) else None
    return isinstance(error, FileNotFoundError) or code in ('404', '403', 'NoSuchKey', 'NoSuchBucket')
