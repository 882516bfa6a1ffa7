# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files in object stores, by Streaming's downloaders and uploaders.

Streaming takes seconds to import, so only functions that need it import it.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union
from urllib.parse import urlparse

import backoff

from llm2clip.errors import ConfigError
from llm2clip.io.files import atomic_write, writing

_ATTEMPTS = 5
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

    def publish(self, *names: str, keep: bool = True) -> None:
        """Upload files in this order; without `keep`, delete them here afterwards."""
        if self.remote is None:
            return
        if urlparse(self.remote).scheme:
            from streaming.base.storage import CloudUploader
            with reaching(self.remote):
                uploader = CloudUploader.get((str(self.local), self.remote), keep_local=keep, retry=_ATTEMPTS,
                                             exist_ok=True)
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
            partial.write_text(text)
        OutputFolder(staging, self.remote).publish(name)
        partial.replace(path)
        shutil.rmtree(staging)


def download(remote: str, path: Union[str, Path]) -> bool:
    """Return whether a remote has a file, after downloading it to `path` atomically, in several attempts."""
    from streaming.base.storage import CloudDownloader
    path = Path(path)
    # Hugging Face's downloader creates folders beside the file.
    work = path.with_name(f'.{path.name}.{os.getpid()}.part')

    @backoff.on_exception(backoff.expo, Exception, max_tries=_ATTEMPTS,
                          giveup=lambda error: is_missing(error)
                          or isinstance(error, (ValueError, ImportError)))
    def attempt() -> None:
        with reaching(remote), writing(path):
            CloudDownloader.direct_download(remote, str(work / path.name))
        if not (work / path.name).exists():  # some downloaders ignore errors
            raise OSError(f'{remote}: the download ended without a file')

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
    """Name the remote in errors of cloud libraries: a ConfigError if there is no access, else in a note."""
    try:
        yield
    except Exception as error:
        # Streaming raises a ValueError if Google's credentials are missing.
        if not is_remote_error(error) and type(error) is not ValueError:
            raise
        error.add_note(f'while reaching {remote}')
        if not _REFUSED.search(f'{type(error).__name__} {error}'):
            raise
        expected = f'credentials: {_CREDENTIALS.get(urlparse(remote).scheme, "those of its library")}'
        if _code(error) == 'NoSuchBucket':
            expected = 'a bucket that exists'
        reason = ' '.join(str(error).split())
        raise ConfigError(f'{remote}: no access ({reason}), expected {expected}') from error


def is_remote_error(error: Exception) -> bool:
    """Whether a cloud library raised an error, for example since its server is down."""
    return type(error).__module__.startswith(_LIBRARIES)


def _code(error: Exception) -> Optional[str]:
    """Return the code in S3's answer, if any."""
    response = getattr(error, 'response', None)
    return response.get('Error', {}).get('Code') if isinstance(response, dict) else None


def is_missing(error: Exception) -> bool:
    """Whether a download failed because the remote has no such file, or does not say whether it has."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    if isinstance(error, LocalEntryNotFoundError):  # a FileNotFoundError, but without a connection
        return False
    return (isinstance(error, (FileNotFoundError, EntryNotFoundError))
            or _code(error) in ('404', '403', 'NoSuchKey'))
