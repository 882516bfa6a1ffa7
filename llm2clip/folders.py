# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folders that one recipe writes and no other, and that appear under their name only when everything is in them, here
and in an object store."""

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, TextIO, Union
from urllib.parse import urlparse

from llm2clip.config import ConfigError
from llm2clip.files import FileError, complete_file, writing

__all__ = [
    'MANIFEST', 'RECORD', 'OutputFolder', 'check_replaceable', 'claimed', 'complete_folder', 'describe_folder',
    'download', 'holds_more_than_record', 'inside', 'is_missing', 'locked', 'reaching', 'stays_inside',
]

MANIFEST = 'MANIFEST'
RECORD = '.llm2clip'
"""In a folder that a recipe writes bit by bit: the recipe's name."""
_ATTEMPTS = 5
_SHOWN = 5
# Scheme of a remote -> where its library looks for credentials, among other places.
_CREDENTIALS = {
    's3': 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or ~/.aws/credentials',
    'gs': 'GCS_KEY and GCS_SECRET in the environment, or GOOGLE_APPLICATION_CREDENTIALS',
}
# What recipes add to a folder that they wrote, and what is left of such a file by a kill while it was written.
_OWN_FILES = re.compile(r'(config\.yaml|seconds\.json)(\.\d+\.tmp)?')


# ---------------------------------------------------------------------------------------------------------------------
# Paths inside a folder
# ---------------------------------------------------------------------------------------------------------------------


def stays_inside(name: str) -> bool:
    """Whether a path, by its parts alone, is relative to a folder and does not lead out of it."""
    return bool(name) and not name.startswith('/') and '..' not in name.split('/') and '\0' not in name


def inside(folder: Union[str, Path], name: str, where: str, also: Iterable[str] = ()) -> Path:
    """The path of a file that data name, which has to be in a folder.

    Args:
        folder: The folder, or a symbolic link to it.
        name: The path of the file in it.
        where: Where the data name it, for messages.
        also: Other folders in which it may be.

    Raises:
        FileError: It is outside: by ``..``, as an absolute path, or by a symbolic link.
    """
    path = os.path.join(folder, name.replace('\0', ''))
    real, roots = os.path.realpath(path), [os.path.realpath(root) for root in (folder, *also)]
    if '\0' in name or not any(os.path.commonpath([root, real]) == root for root in roots):
        raise FileError(f'{where}: the path {name!r} leads to {real}, expected one inside {folder}')
    return Path(path)
# ---------------------------------------------------------------------------------------------------------------------
# Whose a folder is
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(
    path: Union[str, Path], folder: Union[str, Path], part: int = 0, wait: bool = False
) -> Iterator[TextIO]:
    """An open file that this process alone holds until the block ends.

    The system releases it when the process ends in whatever way, and a forked process does not hold it.

    Args:
        path: The file, which is made if it is not there.  If this process opened it once more and closed that, it would
            lose the lock.
        folder: What the lock protects, for the message.
        part: Which of several locks in the file.
        wait: Wait while another process holds it.

    Raises:
        ConfigError: Another process holds it, and `wait` is not asked for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, part)
            free = os.fstat(file.fileno()).st_nlink > 0  # or its holder removed it just now
        except (BlockingIOError, PermissionError):
            free = False
        if not free:
            raise ConfigError(f'{folder}: another process is writing there and holds {path}, expected to be the only '
                              'one; wait for it, stop it, or choose another folder')
        yield file


@contextmanager
def claimed(
    folder: Union[str, Path], recipe: str, names: Optional[Sequence[str]] = None, part: int = 0
) -> Iterator[None]:
    """A folder that no other recipe has written and no other process is writing.

    A hidden file in it says which recipe writes there.

    Args:
        folder: It is made if it is not there, and then removed again if the block leaves nothing in it.
        recipe: Its name.
        names: What the recipe writes; unset, the folder is all its own.
        part: Which of several processes this is that share the folder.

    Raises:
        ConfigError: The folder has files that the recipe did not write, or another process is writing there.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f'{folder}: a file, expected a folder to write into')
    made = not folder.exists()
    there = [] if made else sorted(path.name for path in folder.iterdir() if path.name[0] != '.')
    in_the_way = there if names is None else sorted({*there} & {*names})
    record = folder / RECORD
    if in_the_way and not record.is_file():
        raise ConfigError(f'{folder}: holds {_listed(in_the_way)}, which {recipe} did not write (there is no {RECORD} '
                          'that says so), expected an empty folder or one that it wrote')
    with locked(record, folder, part) as file:
        file.seek(0)
        owner = file.read().strip()
        if owner not in ('', recipe):
            raise ConfigError(f'{folder}: was written by {owner}, expected an empty folder or one that {recipe} wrote')
        if not owner:
            file.write(f'{recipe}\n')
            file.flush()
        try:
            yield
        finally:
            if folder.is_dir() and not holds_more_than_record(folder):
                record.unlink()
                if made:
                    folder.rmdir()


def holds_more_than_record(folder: Union[str, Path]) -> bool:
    """Whether there is such a folder with anything in it but what `claimed` writes."""
    return Path(folder).is_dir() and not {*os.listdir(folder)} <= {RECORD}


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names[:_SHOWN]) + (f' and {len(names) - _SHOWN:,} more' if names[_SHOWN:] else '')


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
        fault = fault and f'{fault} (in it: {_listed(inside)})'
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
        with writing(folder):
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
        return path.is_file() or self.remote is not None and download(os.path.join(self.remote, name), path)

    def publish(self, *names: str, keep: bool = True) -> None:
        """Upload files, in this order; without `keep`, remove them here afterwards."""
        if self.remote is not None:
            _upload(self.local, self.remote, names, keep)

    def commit(self, name: str, text: str) -> None:
        """Write a small file that says that something is complete: what is here is in the remote too."""
        # Machines that share the folder may have processes of the same number.
        staging = self.local / f'.staging.{os.getpid()}.{socket.gethostname()}'
        partial, path = staging / name, self.local / name
        partial.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            partial.write_text(text)
        if self.remote is not None:
            _upload(staging, self.remote, [name], keep=True)
        partial.replace(path)
        shutil.rmtree(staging)


def _upload(folder: Path, remote: str, names: Iterable[str], keep: bool) -> None:
    if urlparse(remote).scheme:
        from streaming.base.storage import CloudUploader
        with reaching(remote):
            uploader = CloudUploader.get((str(folder), remote), keep_local=keep, retry=_ATTEMPTS, exist_ok=True)
            for name in names:
                uploader.upload_file(name)
        return
    for name in names:  # Streaming's uploader makes no folders, and a reader could see half a file
        target = Path(remote, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(target) as partial:
            shutil.copyfile(folder / name, partial)
        if not keep and not target.samefile(folder / name):  # as where a link inside leads there
            (folder / name).unlink()


def download(remote: str, path: Union[str, Path]) -> bool:
    """Whether a remote has a file, after downloading it; it is never seen half written.

    After an error that another attempt may not have, there are others, with growing pauses.

    Args:
        remote: The file, in any place that Streaming's downloaders know.
        path: Where it goes.

    Raises:
        ConfigError: There are no credentials for the remote.
    """
    from streaming.base.storage import CloudDownloader
    path = Path(path)
    # Hugging Face's downloader makes folders beside the file.
    work = path.with_name(f'.{path.name}.{os.getpid()}.part')
    for left in reversed(range(_ATTEMPTS)):
        try:
            with reaching(remote), writing(path):
                CloudDownloader.direct_download(remote, str(work / path.name))
            (work / path.name).replace(path)
            return True
        except Exception as error:
            if is_missing(error):
                return False
            if not left or isinstance(error, (ValueError, ImportError)):  # such as no such kind of place
                raise
            time.sleep(2 ** (_ATTEMPTS - left - 1))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise AssertionError


@contextmanager
def reaching(remote: str) -> Iterator[None]:
    """Say for which remote a block has no credentials, which the libraries of the clouds do not.

    Raises:
        ConfigError: It has none.
    """
    try:
        yield
    except Exception as error:
        # Where Google's are missing, Streaming raises a ValueError.
        said = str(error) if type(error) is ValueError else type(error).__name__
        if not re.search('Credentials|Authentication', said):
            raise
        expected = _CREDENTIALS.get(urlparse(remote).scheme, 'those of its library')
        raise ConfigError(f'{remote}: no access ({" ".join(str(error).split())}), expected credentials: '
                          f'{expected}') from error


def is_missing(error: Exception) -> bool:
    """Whether a download failed since the remote has no such file, or lets nobody know."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    if isinstance(error, LocalEntryNotFoundError):  # a FileNotFoundError, but for want of a connection
        return False
    response = getattr(error, 'response', None)
    code = response.get('Error', {}).get('Code') if isinstance(response, dict) else None
    return (isinstance(error, (FileNotFoundError, EntryNotFoundError))
            or code in ('404', '403', 'NoSuchKey', 'NoSuchBucket'))
