# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files are written atomically, and an error names the file."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import Disk, largest_file
from refusals import refused_at
from safetensors.torch import save_file
from streaming import MDSWriter
from streaming.base.storage import CloudDownloader
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llm2clip.errors import FileError
from llm2clip.io.files import atomic_write, reading, remove_folder, writing
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


def test_what_is_renamed_outlives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    for _ in range(2):
        with atomic_folder(tmp_path / 'model', 'model') as partial:
            (partial / 'inside').mkdir()
            (partial / 'inside/weights').write_text('1')
    with atomic_write(tmp_path / 'file') as partial:
        partial.write_text('1')
    OutputFolder(tmp_path).commit('folder/teacher.json', '{}')
    write_shard(OutputFolder(tmp_path), 0, [{'a': 1}], {'a': 'int'})
    disk.check_names(tmp_path)


def test_a_folder_that_cannot_be_flushed_is_left_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> None:
        if os.path.isdir(f'/proc/self/fd/{file}'):
            raise OSError(errno.EINVAL, 'Invalid argument')

    monkeypatch.setattr(os, 'fsync', refuse)
    with atomic_folder(tmp_path / 'model') as partial:
        (partial / 'weights').write_text('1')
    assert (tmp_path / 'model/weights').is_file()


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_for_a_copy(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'source', None, 'copy')  # as shutil.copyfile raises it


def _failing(folder: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(('write', 'code'), [
    (_full, errno.ENOSPC), (_full_for_a_copy, errno.ENOSPC), (_failing, errno.EIO),
    (lambda folder: save_file({'x': torch.ones(100)}, folder / 'weights'), errno.EFBIG),
    (lambda folder: Tokenizer(WordLevel({'a' * 100: 0})).save(str(folder / 'tokenizer.json')), errno.EFBIG)])
def test_a_failed_write_names_the_folder(write: Callable[[Path], None], code: int, tmp_path: Path) -> None:
    with refused_at(tmp_path / 'made', os.strerror(code)), atomic_folder(tmp_path / 'made') as folder, \
            largest_file(100):
        write(folder)


def test_a_table_is_not_blamed_for_what_cannot_be_written(tmp_path: Path) -> None:
    with refused_at(tmp_path / 'index'), writing(tmp_path / 'index'), reading(tmp_path / 'table', 'a table'):
        raise RuntimeError('FATAL Error: fsync failed!')  # as DuckDB raises it


def test_an_error_while_another_file_is_read_keeps_its_name(tmp_path: Path) -> None:
    for named in (OSError(errno.EIO, os.strerror(errno.EIO), 'photo.jpg'), FileError('is damaged', 'photo.jpg'),
                  ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer')):
        with pytest.raises(type(named)) as error, atomic_write(tmp_path / 'file'):
            raise named
        assert error.value is named


def test_a_failed_flush_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'fsync', _failing)
    with refused_at(tmp_path / 'file', os.strerror(errno.EIO)), atomic_write(tmp_path / 'file') as partial:
        partial.write_text('1')
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_named_by_libraries_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MDSWriter, 'write', _full)
    monkeypatch.setattr(CloudDownloader, 'download', _full)
    with refused_at(tmp_path / 'shard.00000.mds'):
        write_shard(OutputFolder(tmp_path), 0, [{'a': 1}], {'a': 'int'})
    with refused_at(tmp_path / 'file'):
        download('s3://bucket/file', tmp_path / 'file')


def test_a_folder_that_cannot_be_removed_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'outer/inner').mkdir(parents=True)

    def refuse(path: str, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, 'rmdir', refuse)
    with pytest.raises(FileError, match='Permission denied') as error:
        remove_folder(tmp_path / 'outer')
    assert str(tmp_path / 'outer') in str(error.value)
