# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The newest complete checkpoint is found, a damaged one is passed over, and code in one is refused."""

import errno
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer import Trainer
from composer.utils.parallelism import FSDP2Config
from disks import Disk, largest_file
from refusals import refused_at
from small_training import train

from llm2clip.errors import ConfigError, FileError
from llm2clip.modeling.loaders import LoadError
from llm2clip.training.checkpoints import (
    find_checkpoint,
    newest_checkpoint,
    read_latest,
    read_model,
    written_checkpoints,
)


def _train(folder: Path, sharded: bool, **options: Any) -> Trainer:
    fsdp = {'fsdp': FSDP2Config(state_dict_type='sharded')} if sharded else None
    return train(folder, parallelism_config=fsdp, **options)


@pytest.fixture(scope='module', params=[False, True], ids=['full', 'sharded'])
def sharded(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope='module')
def written(sharded: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a training."""
    folder = tmp_path_factory.mktemp('written')
    _train(folder, sharded)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(written, tmp_path / 'c', symlinks=True)


def test_the_weights_are_read_whole(written: Path, tmp_path: Path) -> None:
    model = _train(tmp_path, False).state.model
    found, expected = read_latest(str(written)), model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ConfigError, match='there is no checkpoint'):
        read_latest(str(tmp_path / 'nothing'))


def _name(batch: int, sharded: bool) -> str:
    return f'ep0-ba{batch}' + ('' if sharded else '-rank0.pt')


def _damage(path: Path, how: str) -> None:
    """Cut the largest file of a checkpoint, or change one byte of it."""
    file = max(path.glob('*.distcp'), key=lambda p: p.stat().st_size) if path.is_dir() else path
    data = bytearray(file.read_bytes())
    if how == 'flipped':
        with zipfile.ZipFile(file) as archive:
            entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        name, extra = (int.from_bytes(data[entry.header_offset + i:entry.header_offset + i + 2], 'little')
                       for i in (26, 28))
        data[entry.header_offset + 30 + name + extra] ^= 255
    else:
        data = data[:len(data) // 2]
    file.write_bytes(data)


def test_the_newest_is_found(folder: Path, sharded: bool) -> None:
    (folder / 'latest-rank0.pt').unlink()  # killed between two lines of Composer's
    assert find_checkpoint(str(folder), sharded) == str(folder / _name(3, sharded))
    assert len(list(folder.glob('ep*'))) == 3
    assert os.readlink(folder / 'latest-rank0.pt') == _name(3, sharded)
    with refused_at('fsdp.state_dict_type'):
        find_checkpoint(str(folder), not sharded)
    assert find_checkpoint(str(folder / 'nothing'), sharded) is None


def test_a_checkpoint_that_a_killed_run_should_have_removed_is_removed(folder: Path, sharded: bool) -> None:
    names = [_name(batch, sharded) for batch in (1, 2, 3)]
    for num_to_keep, expected in ((-1, names), (3, names), (2, names[1:])):
        written = written_checkpoints(str(folder), 3, num_to_keep)
        assert [Path(path).relative_to(folder).parts[0] for path in written] == expected
        assert sorted(path.name for path in folder.glob('ep*')) == expected


def test_a_checkpoint_on_a_failing_disk_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(archive: zipfile.ZipFile) -> None:
        raise OSError(errno.EIO, 'Input/output error')

    before = sorted(os.listdir(folder))
    monkeypatch.setattr('zipfile.ZipFile.testzip', fail)
    with pytest.raises(FileError):
        newest_checkpoint(folder)
    assert sorted(os.listdir(folder)) == before


def test_a_checkpoint_is_on_the_disk_before_older_ones_are_removed(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    _train(tmp_path, sharded, save_num_checkpoints_to_keep=1)
    for batch in (2, 3):
        newest, older = (tmp_path / _name(n, sharded) for n in (batch, batch - 1))
        removed = disk.calls.index(('remove', str(older)))
        flushed = [path for call, path in disk.calls[:removed] if call == 'flush']
        linked = disk.calls.index(('remove', str(tmp_path / 'latest-rank0.pt')))
        assert str(newest) in flushed and flushed[-2:].count(str(tmp_path)), flushed
        assert ('flush', str(tmp_path)) in disk.calls[:linked]
        if sharded:
            assert {str(newest / '__0_0.distcp'), f'{newest}/.metadata.tmp'} <= {*flushed}
        del disk.calls[:removed + 1]


@pytest.mark.parametrize('size', [100, 1500])
def test_a_checkpoint_that_cannot_be_written_is_named(sharded: bool, size: int, tmp_path: Path) -> None:
    with largest_file(size), pytest.raises(FileError, match=os.strerror(errno.EFBIG)) as error:
        _train(tmp_path, sharded)
    assert error.value.path.startswith(f'{tmp_path}/{_name(1, sharded)}')


@pytest.mark.parametrize('how', ['flipped', 'cut', 'unfinished'])
def test_a_damaged_one_is_passed_over_with_a_warning(folder: Path, sharded: bool, how: str) -> None:
    last = folder / _name(3, sharded)
    if how != 'unfinished':
        _damage(last, how)
    elif sharded:
        (last / '.metadata').unlink()
    else:
        last.write_bytes(b'')
    with pytest.warns(UserWarning, match=rf'{_name(3, sharded)}: .*resuming from {_name(2, sharded)}'):
        assert find_checkpoint(str(folder), sharded) == str(folder / _name(2, sharded))
    assert _train(folder, sharded, load_path=str(folder / _name(2, sharded)), steps=4).state.timestamp.batch == 4


def test_only_damaged_ones_are_an_error_except_a_first_one(folder: Path, sharded: bool, tmp_path: Path) -> None:
    for batch in (1, 2, 3):
        _damage(folder / _name(batch, sharded), 'cut')
    with pytest.raises(ConfigError, match=r'every checkpoint is incomplete or damaged: .*ba3.*ba2.*ba1'):
        newest_checkpoint(folder)
    first = tmp_path / 'ep0-ba1-rank0.pt'
    first.write_bytes(b'half')  # killed in its first checkpoint
    assert newest_checkpoint(tmp_path) is None and not first.exists()


@pytest.mark.parametrize('how', ['flipped', 'cut'])
def test_damaged_weights_are_not_read(folder: Path, sharded: bool, how: str) -> None:
    whole, last = read_latest(str(folder)), folder / 'latest-rank0.pt'
    _damage(folder / _name(3, sharded), how)
    with pytest.raises(FileError):
        read_latest(str(folder))
    whole['image.weight'][1, 1] = float('nan')
    last.unlink()
    if sharded:
        dcp.save({'state': {'model': whole}}, checkpoint_id=last)
    else:
        torch.save({'state': {'model': whole}}, last)
    with pytest.raises(LoadError, match='image.weight holds values that are not finite'):
        read_latest(str(folder))


class _Code:

    def __reduce__(self) -> Any:
        return os.mkdir, ('pwned',)


def test_code_in_a_checkpoint_is_refused(folder: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    find_checkpoint(str(folder), sharded)  # after which Composer refuses code, too
    last = folder / _name(3, sharded)
    if sharded:
        metadata = last / '.metadata'
        original = metadata.read_bytes()
        metadata.write_bytes(pickle.dumps(_Code()))
        with pytest.raises(ConfigError, match=r'ba3/.metadata holds (posix|os).mkdir, which would run code'):
            newest_checkpoint(folder)
        metadata.write_bytes(original)
        shutil.rmtree(last)
        dcp.save({'state': {'x': torch.ones(2), 'y': _Code()}}, checkpoint_id=last)
    else:
        state = torch.load(last, weights_only=False)
        state['state']['run_name'] = _Code()
        torch.save(state, last)
    with pytest.raises(ConfigError, match=r'ba3.* holds posix.mkdir, which would run code'):
        newest_checkpoint(folder)
    with pytest.raises(ValueError, match='ba3.* would run code'):
        read_model(last)
    if not sharded:
        with pytest.raises(Exception, match=r'(?i)weights.only'):
            _train(folder, False, load_path=str(last), steps=4)
    assert not (folder / 'pwned').exists()
