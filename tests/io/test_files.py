# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files are written atomically, and an error names the file."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming import MDSWriter
from streaming.base.storage import CloudDownloader

from llm2clip.errors import FileError
from llm2clip.io.files import atomic_write
from llm2clip.io.folders import atomic_folder
from llm2clip.io.remotes import OutputFolder, download
from llm2clip.teacher.extraction import write_shard


def test_what_is_made_gets_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        with atomic_folder(tmp_path / 'made', 'model') as partial:
            (partial / 'private').mkdir(mode=0o700)
            (partial / 'private/weights').touch(mode=0o600)
        with atomic_write(tmp_path / 'file') as partial:
            partial.unlink()
            partial.touch(mode=0o600)
    finally:
        os.umask(before)
    made = list(tmp_path.rglob('*'))
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o770}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o660}


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_for_a_copy(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'source', None, 'copy')  # as shutil.copyfile raises it


@pytest.mark.parametrize('write', [_full, _full_for_a_copy])
def test_a_failed_write_names_the_folder(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(FileError, match='cannot be written .No space left') as error, \
            atomic_folder(tmp_path / 'made') as folder:
        write(folder)
    assert error.value.path == f'{tmp_path}/made'


def test_a_full_disk_is_named_by_libraries_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MDSWriter, 'write', _full)
    monkeypatch.setattr(CloudDownloader, 'download', _full)
    with pytest.raises(FileError) as of_shard:
        write_shard(OutputFolder(tmp_path), 0, [{'a': 1}], {'a': 'int'})
    with pytest.raises(FileError) as of_download:
        download('s3://bucket/file', tmp_path / 'file')
    assert [error.value.path for error in (of_shard, of_download)] == [
        f'{tmp_path}/shard.00000.mds', f'{tmp_path}/file']
