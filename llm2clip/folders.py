# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files and folders that appear under their name only when everything is in them, here and in an object store."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union
from urllib.parse import urlparse

from llm2clip.config import ConfigError

__all__ = ['OutputFolder', 'complete_file', 'complete_folder', 'is_missing', 'write_text']

_ATTEMPTS = 5


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


@contextmanager
def complete_file(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` when the block ends without an exception."""
    path = Path(path)
    partial = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    yield partial
    partial.replace(path)


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a file that is never seen half written."""
    with complete_file(path) as partial:
        # A file's name in it may hold bytes that are no text.
        partial.write_text(text, encoding='utf-8', errors='replace')


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
            from streaming.base.storage import CloudUploader
            try:
                CloudUploader._validate(CloudUploader, (str(local), remote))  # pyright: ignore
            except ValueError:
                raise ConfigError(f'Streaming cannot write to {remote}') from None

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
    else:  # Streaming's uploader makes no folders, and a reader could see half a file
        for name in names:
            _copy(folder / name, Path(remote, name), keep)


def _copy(source: Path, target: Path, keep: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f'{target.name}.{os.getpid()}.part')
    shutil.copy(source, partial)
    partial.replace(target)
    if not keep:
        source.unlink()


def is_missing(error: Exception) -> bool:
    """Whether a download failed since the remote has no such file, or lets nobody know."""
    response = getattr(error, 'response', None)
    code = response.get('Error', {}).get('Code') if isinstance(response, dict) else None
    return isinstance(error, FileNotFoundError) or code in ('404', '403', 'NoSuchKey', 'NoSuchBucket')
