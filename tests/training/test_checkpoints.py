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
from small_training import train

from llm2clip.errors import ConfigError, FileError
from llm2clip.training.checkpoints import find_checkpoint, newest_checkpoint, read_latest, read_model


def _train(folder: Path, sharded: bool, **options: Any) -> Trainer:
    fsdp = {'fsdp': FSDP2Config(state_dict_type='sharded')} if sharded else None
    return train(folder, parallelism_config=fsdp, **options)


@pytest.fixture(scope='module', params=['full', 'sharded'])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    folder = tmp_path_factory.mktemp(request.param)
    _train(folder, request.param == 'sharded')
    return folder, request.param == 'sharded'


def test_the_weights_are_read_whole(written: tuple[Path, bool], tmp_path: Path) -> None:
    model = _train(tmp_path, False).state.model
    found, expected = read_latest(str(written[0])), model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ConfigError, match='there is no checkpoint'):
        read_latest(str(tmp_path / 'nothing'))


@pytest.fixture
def folder(written: tuple[Path, bool], tmp_path: Path) -> Path:
    shutil.copytree(written[0], tmp_path / 'c', symlinks=True)
    return tmp_path / 'c'


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


def test_the_newest_is_found(folder: Path, written: tuple[Path, bool]) -> None:
    sharded = written[1]
    (folder / 'latest-rank0.pt').unlink()  # killed between two lines of Composer's
    assert find_checkpoint(str(folder), sharded) == str(folder / _name(3, sharded))
    assert len(list(folder.glob('ep*'))) == 3
    assert os.readlink(folder / 'latest-rank0.pt') == _name(3, sharded)
    with pytest.raises(ConfigError, match='but this run writes and reads'):
        find_checkpoint(str(folder), not sharded)
    assert find_checkpoint(str(folder / 'nothing'), sharded) is None


def test_a_checkpoint_on_a_failing_disk_is_kept(
    folder: Path, written: tuple[Path, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr('zipfile.ZipFile.testzip', fail)
    with pytest.raises(FileError):
        newest_checkpoint(folder)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(written[0]))


@pytest.mark.parametrize('how', ['flipped', 'cut', 'unfinished'])
def test_a_damaged_one_is_passed_over_with_a_warning(folder: Path, written: tuple[Path, bool], how: str) -> None:
    sharded = written[1]
    last = folder / _name(3, sharded)
    if how == 'unfinished' and sharded:
        (last / '.metadata').unlink()
    elif how == 'unfinished':
        last.write_bytes(b'')
    else:
        _damage(last, how)
    with pytest.warns(UserWarning, match=rf'{_name(3, sharded)}: .*resuming from {_name(2, sharded)}'):
        assert find_checkpoint(str(folder), sharded) == str(folder / _name(2, sharded))
    assert _train(folder, sharded, load_path=str(folder / _name(2, sharded)), steps=4).state.timestamp.batch == 4


def test_only_damaged_ones_are_an_error_except_a_first_one(folder: Path, written: tuple[Path, bool]) -> None:
    for batch in (1, 2, 3):
        _damage(folder / _name(batch, written[1]), 'cut')
    with pytest.raises(ConfigError, match=r'every checkpoint is incomplete or damaged: .*ba3.*ba2.*ba1'):
        newest_checkpoint(folder)
    for path in folder.glob('*'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / 'ep0-ba1-rank0.pt').write_bytes(b'half')  # killed in its first checkpoint
    assert newest_checkpoint(folder) is None and not list(folder.glob('ep*'))


@pytest.mark.parametrize('how', ['cut', 'no index', 'not finite'])
def test_damaged_weights_are_not_read(how: str, folder: Path, written: tuple[Path, bool]) -> None:
    sharded = written[1]
    last, whole = folder / _name(3, sharded), read_latest(str(folder))
    if how == 'not finite':
        whole['image.weight'][1, 1] = float('nan')
        state = {'state': {'model': whole}}
        if sharded:
            shutil.rmtree(last)
            dcp.save(state, checkpoint_id=last)
        else:
            torch.save(state, last)
    elif how == 'no index' and sharded:
        (last / '.metadata').write_bytes(pickle.dumps({}))
    else:
        _damage(last, how)
    with pytest.raises(ValueError, match='image.weight holds values that are not finite' if how == 'not finite' else
                       r'(ep0-ba3|latest|metadata).*, expected a checkpoint'):
        read_latest(str(folder))


class _Code:

    def __reduce__(self) -> Any:
        return os.system, ('touch pwned',)


def test_a_checkpoint_that_would_run_code_is_refused(
    folder: Path, written: tuple[Path, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    sharded = written[1]
    find_checkpoint(str(folder), sharded)  # after which Composer refuses code, too
    last = folder / _name(3, sharded)
    if sharded:
        metadata = last / '.metadata'
        original = metadata.read_bytes()
        metadata.write_bytes(pickle.dumps(_Code()))
        with pytest.raises(ConfigError, match=r'ba3/.metadata holds (posix|os).system, which would run code'):
            newest_checkpoint(folder)
        metadata.write_bytes(original)
        shutil.rmtree(last)
        dcp.save({'state': {'x': torch.ones(2), 'y': _Code()}}, checkpoint_id=last)
    else:
        state = torch.load(last, weights_only=False)
        state['state']['run_name'] = _Code()
        torch.save(state, last)
    with pytest.raises(ConfigError, match=r'ba3.* holds posix.system, which would run code'):
        newest_checkpoint(folder)
    with pytest.raises(ValueError, match='ba3.* would run code'):
        read_model(last)
    if not sharded:
        with pytest.raises(Exception, match=r'(?i)weights.only'):
            _train(folder, False, load_path=str(last), steps=4)
    assert not (folder / 'pwned').exists()
