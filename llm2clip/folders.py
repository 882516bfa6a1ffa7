# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folders that one recipe writes and no other, and that appear under their name only when everything is in them, here
and in an object store."""

import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union
from urllib.parse import urlparse

import backoff
from filelock import FileLock, Timeout

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
# Scheme of a remote -> where its library looks for credentials, among other places.
_CREDENTIALS = {
    's3': 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or ~/.aws/credentials',
    'gs': 'GCS_KEY and GCS_SECRET in the environment, or GOOGLE_APPLICATION_CREDENTIALS',
}
# What recipes add to a folder that they wrote, and what is left of such a file by a kill while it was written.
_OWN_FILES = re.compile(r'(config\.yaml|seconds\.json)(\.\d+\.tmp)?')


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
# Folders that grow bit by bit
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Union[str, Path], folder: Union[str, Path], wait: bool = False) -> Iterator[None]:
    """Hold a lock file, which the system releases when this process ends; forked processes do not hold it.

    Args:
        path: The lock file, which is made if it is not there.
        folder: What the lock protects, for the message.
        wait: Wait while another process holds it; otherwise that is a ConfigError.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path, timeout=-1 if wait else 0).acquire()
    except Timeout:
        raise ConfigError(f'{folder}: another process is writing there and holds {path}, expected to be the only one; '
                          'wait for it, stop it, or choose another folder') from None
    with lock:
        yield


@contextmanager
def claimed(
    folder: Union[str, Path], recipe: str, names: Optional[Sequence[str]] = None, part: int = 0
) -> Iterator[None]:
    """A folder that no other recipe has written and no other process writes; a hidden file holds the recipe's name.

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
    made, record = not folder.exists(), folder / RECORD
    there = [] if made else sorted(path.name for path in folder.iterdir() if path.name[0] != '.')
    in_the_way = [name for name in there if names is None or name in names]
    if in_the_way and not record.is_file():
        raise ConfigError(f'{folder}: holds {_listed(in_the_way)}, which {recipe} did not write (there is no {RECORD} '
                          'that says so), expected an empty folder or one that it wrote')
    lock = folder / f'{RECORD}.{part}' if part else record
    with locked(lock, folder):
        owner = record.read_text().strip() if record.is_file() else ''
        if owner not in ('', recipe):
            raise ConfigError(f'{folder}: was written by {owner}, expected an empty folder or one that {recipe} wrote')
        if not owner:
            record.write_text(f'{recipe}\n')  # in place, since the file may be locked
        try:
            yield
        finally:
            if part:
                lock.unlink(missing_ok=True)
            if folder.is_dir() and not holds_more_than_record(folder):
                record.unlink()
                if made:
                    folder.rmdir()


def holds_more_than_record(folder: Union[str, Path]) -> bool:
    """Whether there is such a folder with anything in it but what `claimed` writes."""
    return Path(folder).is_dir() and not {*os.listdir(folder)} <= {RECORD}


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5:,} more' if names[5:] else '')


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are replaced as a whole
# ---------------------------------------------------------------------------------------------------------------------


def check_replaceable(folder: Union[str, Path], kind: str) -> None:
    """Make sure that nothing is lost if `folder` is replaced by a new one of this kind.

    Raises:
        ConfigError: It holds anything that `complete_folder` did not write there for the same kind, by its manifest;
            names it.  Or a folder of somebody else's has the name of the temporary one.
    """
    folder = Path(os.path.abspath(folder))
    fault = 'it is no folder' if folder.exists() and not folder.is_dir() else None
    if fault is None and (names := sorted(os.listdir(folder)) if folder.exists() else []):
        manifest = folder / MANIFEST
        lines = manifest.read_text(errors='replace').splitlines() if manifest.is_file() else []
        sizes = dict(line.split(' ', 1)[::-1] for line in lines[1:] if ' ' in line)
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*')
                 if path.is_symlink() or not path.is_dir()} if lines[:1] == [_title(kind)] else {}
        others = sorted(name for name in found.keys() - sizes.keys() - {MANIFEST} if not _OWN_FILES.fullmatch(name))
        changed = [name for name, size in sizes.items() if name in found and str(found[name].stat().st_size) != size]
        if not found:
            fault = f'it has no {MANIFEST} that says that it is one'
        elif others or changed:
            fault = f'{others[0]} has been put into it' if others else f'{changed[0]} has been changed'
        fault = fault and f'{fault} (in it: {_listed(names)})'
    if fault is not None:
        raise ConfigError(f'{folder} is there already and is not replaced by a new {kind}: {fault}. '
                          'Choose another folder, or remove that one')
    work = _work_folder(folder)
    if work.exists() and not (work.is_dir() and {*os.listdir(work)} <= {'new', 'old'}):
        raise ConfigError(f'{work} is in the way of what is written there first; move it elsewhere')


def _work_folder(folder: Path) -> Path:
    """Where ``new`` is written, and ``old`` is kept while one takes the place of the other."""
    return folder.with_name(f'{folder.name}.tmp')


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
    mode = new.stat().st_mode & 0o777  # what the umask leaves; that of safetensors and temporary files is narrower
    try:
        with writing(folder):
            yield new
            paths = sorted(path for path in new.rglob('*'))
            if kind is not None:
                lines = [f'{path.stat().st_size} {path.relative_to(new).as_posix()}' for path in paths
                         if not path.is_dir()]
                (new / MANIFEST).write_text('\n'.join([_title(kind), *lines]) + '\n')
                check_replaceable(folder, kind)
            for path in paths:
                if not path.is_symlink():
                    path.chmod(mode if path.is_dir() else mode & 0o666)
    except BaseException:
        shutil.rmtree(work)
        raise
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(work)


def describe_folder(folder: Union[str, Path]) -> str:
    """Its path, size and contents, for a message."""
    size = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
    names = sorted(f'{path.name}/' if path.is_dir() else path.name for path in Path(folder).iterdir())
    return f'{folder} ({size / 1e6:,.1f} MB): {", ".join(names)}'


# ---------------------------------------------------------------------------------------------------------------------
# Object stores
# ---------------------------------------------------------------------------------------------------------------------


class OutputFolder:
    """A folder that is written here and uploaded, file by file, to its remote if it has one.

    Args:
        local: The folder.
        remote: Where its files go as well, any place that Streaming's uploaders know; unset, nowhere.

    Raises:
        ConfigError: Streaming cannot write to such a remote.
    """

    def __init__(self, local: Union[str, Path], remote: Optional[str] = None) -> None:
        self.local, self.remote = Path(local), remote
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
        with complete_file(target) as partial:
            shutil.copyfile(folder / name, partial)
        if not keep and not target.samefile(folder / name):  # as where a link inside leads there
            (folder / name).unlink()


def download(remote: str, path: Union[str, Path]) -> bool:
    """Whether a remote has a file, after downloading it, in several attempts; it is never seen half written.

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

    @backoff.on_exception(backoff.expo, Exception, max_tries=_ATTEMPTS,
                          giveup=lambda error: is_missing(error) or isinstance(error, (ValueError, ImportError)))
    def attempt() -> None:
        with reaching(remote), writing(path):
            CloudDownloader.direct_download(remote, str(work / path.name))

    try:
        attempt()
        (work / path.name).replace(path)
        return True
    except Exception as error:
        if is_missing(error):
            return False
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def reaching(remote: str) -> Iterator[None]:
    """Raise a ConfigError that names the remote if a block has no credentials for it, as clouds' libraries do not."""
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
