# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files in object stores, by Streaming's downloaders and uploaders.

Streaming takes seconds to import, so only functions that need it import it.
"""

import functools
import logging
import os
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional, Union
from urllib.parse import urlparse

from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import atomic_write, durable_rename, json_damage, remove_folder, writing

log = logging.getLogger(__name__)

_ATTEMPTS = 5
_LONGEST_WAIT = 30
_DOWNLOADS = 16  # at once
_REFUSED = re.compile('Credentials|Authentication|SignatureDoesNotMatch|InvalidAccessKeyId|ExpiredToken|'
                      'AccessDenied|NoSuchBucket')
_LIBRARIES = ('botocore.', 'boto3.', 'google.', 'azure.', 'oci.', 'paramiko.', 'composer.utils.object_store.')
# Scheme of a remote -> main places where its library looks for credentials.
_CREDENTIALS = {
    's3': 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or ~/.aws/credentials',
    'gs': 'GCS_KEY and GCS_SECRET in the environment, or GOOGLE_APPLICATION_CREDENTIALS',
}


class OutputFolder:
    """Local folder, uploaded file by file to its remote, if any."""

    def __init__(self, local: Union[str, Path], remote: Optional[str] = None) -> None:
        self.local = Path(local)
        self.remote = remote

    def __str__(self) -> str:
        return str(self.local) if self.remote is None else f'{self.local} (and {self.remote})'

    def fetch(self, name: str) -> bool:
        """Return whether the file `name` is here, after downloading it if only the remote has it."""
        path = self.local / name
        return path.is_file() or self.remote is not None and download(os.path.join(self.remote, name), path)

    def fetch_all(self, names: Iterable[str]) -> list[bool]:
        """Call `fetch` for each file, with several downloads at once."""
        if self.remote is None:
            return list(map(self.fetch, names))
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            return list(pool.map(self.fetch, names))

    def existing(self, names: Sequence[str]) -> set[str]:
        """Return which of the files, all in the same folder, are here or in the remote."""
        existing = {path.name for path in self.local.glob('*')}
        if self.remote is not None and not existing.issuperset(names):
            existing |= self._remote_names(names)
        return existing.intersection(names)

    def _remote_names(self, names: Sequence[str]) -> set[str]:
        """Return the names of the remote's files that begin as the given ones do, from one listing; files of
        a remote that Streaming cannot list are downloaded."""
        remote = str(self.remote)
        if urlparse(remote).scheme:
            with suppress(NotImplementedError), reaching(remote):
                uploader = _process_uploader(self.local, remote, True, os.getpid())
                keys = uploader.list_objects(os.path.commonprefix(names))
                return set(map(os.path.basename, keys))
        self.fetch_all(names)
        return {path.name for path in self.local.glob('*')}

    def publish(self, *names: str, keep: bool = True) -> None:
        """Upload files in this order; without `keep`, delete them here afterwards."""
        if self.remote is None:
            return
        if urlparse(self.remote).scheme:
            for name in names:
                if {'#', '?'} & {*name}:  # Streaming would cut the URL off there, and overwrite other objects
                    raise FileError('cannot be uploaded, expected a name without # and ?; rename the input',
                                    self.local / name)
            with reaching(self.remote):
                uploader = _process_uploader(self.local, self.remote, keep, os.getpid())
                for name in names:
                    uploader.upload_file(name)
            return
        for name in names:  # Streaming's uploader creates no folders and is not atomic
            source, target = self.local / name, Path(self.remote, name)
            with atomic_write(target) as partial:
                shutil.copyfile(source, partial)
            if not keep and not target.samefile(source):  # a link may lead from one to the other
                source.unlink()

    def commit(self, name: str, text: str) -> None:
        """Write a small file that marks something as complete; it appears in the remote first."""
        # Machines that share the folder may have the same process ids.
        staging = self.local / f'.staging.{os.getpid()}.{socket.gethostname()}'
        partial = staging / name
        path = self.local / name
        partial.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            partial.write_text(text, encoding='utf-8', errors='replace')
        OutputFolder(staging, self.remote).publish(name)
        durable_rename(partial, path)
        remove_folder(staging)


@functools.lru_cache(maxsize=8)
def _process_uploader(local: Path, remote: str, keep: bool, process: int) -> Any:
    """Streaming's uploader from a folder to its remote; one per process, as for downloads."""
    from streaming.base.storage import CloudUploader
    return CloudUploader.get((str(local), remote), keep_local=keep, retry=_ATTEMPTS, exist_ok=True)


@functools.lru_cache(maxsize=4)
def _process_downloader(place: str, process: int) -> Any:
    """Streaming's downloader for the remotes in a place, such as ``s3://bucket``; one per process, since
    connections do not survive a fork."""
    from streaming.base.storage import CloudDownloader
    return CloudDownloader.get(place)


def download(
    remote: str, path: Union[str, Path], find_damage: Callable[[Path], Optional[str]] = json_damage,
    attempts: int = _ATTEMPTS, timeout: float = 120.0, work: Optional[Path] = None,
) -> bool:
    """Download a file atomically, in several attempts with growing pauses; return whether the remote has it.

    Args:
        remote: URL or path of the file.
        path: Local path.
        find_damage: Function that returns what is wrong with a downloaded file, or None.
        attempts: Maximum number of attempts.
        timeout: Maximum seconds of an attempt, which not all of Streaming's downloaders enforce.
        work: Temporary folder, on the disk of `path`.  Unset: one beside `path`.

    Raises:
        ConfigError: There are no credentials for the remote.
        FileError: The disk is full.
        OSError: The file cannot be downloaded, or is damaged.
    """
    path = Path(path)
    # Hugging Face's downloader first writes to the file's name in the remote, which may be beside `path`.
    work = work or path.with_name(f'.{path.name}.{os.getpid()}.part')
    partial = work / path.name
    problem = ''
    for attempt in range(attempts):
        if attempt:
            seconds = min(2 ** (attempt - 1), _LONGEST_WAIT)
            log.warning(f'{problem}; trying again in {seconds} s')
            time.sleep(seconds + random.random() / 2)
        try:
            with reaching(remote), writing(path):
                _download_within(timeout, remote, partial)
            damage = find_damage(partial)
            if damage is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(path)
                return True
            problem = f'{remote} is damaged: {damage}'
        except (ConfigError, FileError):
            raise
        except Exception as error:
            if is_missing(error):
                return False
            _process_downloader.cache_clear()
            problem = f'{remote} cannot be downloaded: {type(error).__name__}: {error}'
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise OSError(f'{problem} (tried {attempts} times)')


def _download_within(timeout: float, remote: str, path: Path) -> None:
    """Download a file in a thread, which is left behind after `timeout` seconds."""
    place = '/'.join(remote.split('/')[:3])  # not the folder, since each part of a dataset has its own
    downloader = _process_downloader(place, os.getpid())
    future: Future[None] = Future()

    def work() -> None:
        try:
            future.set_result(downloader.download(remote, str(path), timeout))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([future], timeout).done:
        raise TimeoutError(f'no end after {timeout:.0f} s')
    future.result()
    if not path.exists():  # some downloaders ignore errors
        raise OSError('the download ended without a file')


@contextmanager
def reaching(remote: str) -> Iterator[None]:
    """Name the remote in errors of cloud libraries: a ConfigError if there is no access, else in a note."""
    try:
        yield
    except Exception as error:
        # Streaming raises a ValueError if Google's credentials are missing.
        if not is_remote_error(error) and type(error) is not ValueError:
            raise
        error.add_note(f'while reaching {remote}')
        refusal = _REFUSED.search(f'{type(error).__name__} {error}')
        if refusal is None:
            raise
        expected = f'credentials: {_CREDENTIALS.get(urlparse(remote).scheme, "those of its library")}'
        if refusal[0] == 'NoSuchBucket':
            expected = 'a bucket that exists'
        reason = ' '.join(str(error).split())
        raise ConfigError(f'{remote}: no access ({reason}), expected {expected}') from error


def is_remote_error(error: Exception) -> bool:
    """Whether a cloud library raised an error, for example since its server is down."""
    return type(error).__module__.startswith(_LIBRARIES)


def is_missing(error: Exception) -> bool:
    """Whether a download failed because the remote has no such file, or does not say whether it has."""
    from botocore.exceptions import ClientError
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    if isinstance(error, LocalEntryNotFoundError):  # a FileNotFoundError, but without a connection
        return False
    if isinstance(error, ClientError):  # of S3
        return error.response['Error']['Code'] in ('404', '403', 'NoSuchKey')
    if is_remote_error(error):  # of Google Cloud, Azure and Oracle, which name the status differently
        return 404 in [getattr(error, name, None) for name in ('code', 'status_code', 'status')]
    return isinstance(error, (FileNotFoundError, EntryNotFoundError))
