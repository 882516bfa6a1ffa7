# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What replaces a folder: only what is of the same kind, and nothing is lost on the way."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest
from streaming import MDSWriter
from streaming.base.storage import CloudDownloader

from llm2clip.config import ExtractConfig
from llm2clip.config.loading import load_config
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import atomic_write
from llm2clip.io.folders import MANIFEST, atomic_folder, inside, lock_output, stays_inside
from llm2clip.io.remotes import OutputFolder, download
from llm2clip.teacher.extraction import write_shard
from llm2clip.training.checkpoints import find_checkpoint, read_latest


def write(folder: Path, text: str, kind: str = 'model') -> None:
    with atomic_folder(folder, kind) as partial:
        (partial / 'inside').mkdir()
        (partial / 'inside/weights').write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'out'
    out.mkdir(parents=True)  # an empty one is taken
    write(out, 'first')
    for name in ('config.yaml', 'seconds.json', 'config.yaml.1234.tmp'):  # left by recipes, the last by a killed one
        (out / name).touch()
    write(out, 'second one')
    manifest = b'model, written by llm2clip\n10 inside/weights\n'
    assert contents(out) == {'inside/weights': b'second one', MANIFEST: manifest}
    assert os.listdir(tmp_path / 'new') == ['out']


def _of_a_run(folder: Path) -> str:
    (folder / 'checkpoints').mkdir()
    (folder / 'config.yaml').touch()
    return f'it has no {MANIFEST} that says that it is one (in it: checkpoints, config.yaml)'


def _of_another_kind(folder: Path) -> str:
    write(folder, 'text', 'teacher')
    return f'it has no {MANIFEST} that says that it is one'


def _with_a_link(folder: Path) -> str:
    write(folder, 'text')
    (folder / 'inside/link').symlink_to(folder.parent)
    return 'inside/link has been put into it'


def _trained_on(folder: Path) -> str:
    write(folder, 'text')
    (folder / 'inside/weights').write_text('other text')
    return 'inside/weights has been put into it or changed'


@pytest.mark.parametrize('make', [_of_a_run, _of_another_kind, _with_a_link, _trained_on])
def test_any_other_folder_is_refused_before_the_work(make: Callable[[Path], str], tmp_path: Path) -> None:
    out = tmp_path / 'out'
    out.mkdir()
    message = make(out)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f'{out} is there already and is not replaced by a new model: ') as error:
        write(out, 'new')
    assert message in str(error.value) and contents(tmp_path) == before


def test_neither_the_working_folder_nor_a_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / '.profile').touch()
    monkeypatch.chdir(tmp_path)
    for out in (Path('.'), tmp_path / '.profile'):
        with pytest.raises(ConfigError, match='is there already and is not replaced'):
            write(out, 'text')
    assert os.listdir(tmp_path) == ['.profile']


def test_work_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / 'out', 'first')
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / 'out', 'model') as partial:
        (partial / 'weights').touch()
        raise KeyboardInterrupt
    assert contents(tmp_path) == before


def test_what_is_put_into_the_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    write(tmp_path / 'out', 'first')
    with pytest.raises(ConfigError, match='notes has been put into it'), atomic_folder(tmp_path / 'out', 'model'):
        (tmp_path / 'out/notes').touch()
    assert sorted(os.listdir(tmp_path / 'out')) == [MANIFEST, 'inside', 'notes']


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_a_kill_at_any_moment_of_the_exchange_loses_nothing(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'out'
    write(out, 'first')
    replace, rmtree, done = Path.replace, shutil.rmtree, []

    def dying(path: Path, target: Optional[Path] = None) -> Path:
        if len(done) == renames:
            raise SystemExit
        done.append(path)
        assert target is not None
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', dying)
        patch.setattr(shutil, 'rmtree', lambda path, **options: (dying if done else rmtree)(path, **options))
        with pytest.raises(SystemExit):
            write(out, 'second')
    found = {data for name, data in contents(tmp_path).items() if name.endswith('weights')}
    assert b'first' in found or (out / 'inside/weights').read_text() == 'second'
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, 'model'):
        raise KeyboardInterrupt
    assert (out / 'inside/weights').read_text() == ('second' if renames == 2 else 'first')
    assert os.listdir(tmp_path) == ['out']


def test_a_folder_in_the_way_of_the_work_is_kept(tmp_path: Path) -> None:
    (tmp_path / 'out.tmp').mkdir()
    (tmp_path / 'out.tmp/mine').touch()
    with pytest.raises(ConfigError, match='out.tmp is in the way'):
        write(tmp_path / 'out', 'text')
    assert (tmp_path / 'out.tmp/mine').is_file()


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    def made(umask: int) -> list[int]:
        before = os.umask(umask)
        try:
            with atomic_folder(tmp_path / f'{umask}', 'model') as partial:
                (partial / 'private').mkdir(mode=0o700)
                (partial / 'private/weights').touch(mode=0o600)
            with atomic_write(tmp_path / f'{umask}.safetensors') as file:
                file.unlink()
                file.touch(mode=0o600)
        finally:
            os.umask(before)
        out = tmp_path / f'{umask}'
        return [path.stat().st_mode & 0o777 for path in (
            out, out / 'private', out / 'private/weights', out / MANIFEST, out.with_suffix('.safetensors'))]

    assert made(0o007) == [0o770, 0o770, 0o660, 0o660, 0o660]


def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder/up').symlink_to('..')
    (tmp_path / 'folder/out').symlink_to('/etc/hostname')
    (tmp_path / 'link').symlink_to('folder')
    for folder in ('folder', 'link'):
        for name in ('../b', '/etc/hostname', 'up/b', 'a\0', 'out'):
            with pytest.raises(FileError, match=f'c.csv: .* leads to .*, expected one inside {tmp_path}/{folder}'):
                inside(tmp_path / folder, name, 'c.csv')
            assert name not in ('../b', 'up/b') or inside(tmp_path / folder, name, 'c.csv', [str(tmp_path)])
        for name in ('a/b', './a', 'a/../b', 'up/folder/a', '...'):
            assert inside(tmp_path / folder, name, 'c.csv') == tmp_path / folder / name
            assert inside(tmp_path / folder, f'{tmp_path}/{folder}/{name}', 'c.csv') == tmp_path / folder / name
            assert stays_inside(name) is (name != 'a/../b')
    assert inside('/', '/etc/hostname', 'c.csv') == Path('/etc/hostname')


def test_a_remote_that_is_the_local_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'data').mkdir()
    (tmp_path / 'link').symlink_to('data')
    monkeypatch.chdir(tmp_path)
    given = ['datasets.train.local=data', 'out=new', 'teacher=x']
    for remote in ('data', './data/', 'link', f'{tmp_path}/link', f'file://{tmp_path}/data'):
        with pytest.raises(ConfigError, match=r'datasets\.train\.remote .*another place than local, data'):
            load_config(ExtractConfig, [*given, f'datasets.train.remote={remote}'])
    with pytest.raises(ConfigError, match='out_remote .*another place than out, new'):
        load_config(ExtractConfig, [*given, f'out_remote={tmp_path}/new'])
    load_config(ExtractConfig, [*given, 'datasets.train.remote=s3://data', 'out_remote=data/new'])


def test_a_remote_without_credentials_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_PROFILE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in (('HOME', str(tmp_path)), ('AWS_EC2_METADATA_DISABLED', 'true'), ('AWS_DEFAULT_REGION', 'x'),
                        ('S3_ENDPOINT_URL', 'http://127.0.0.1:9')):
        monkeypatch.setenv(name, value)
    (tmp_path / 'file').touch()
    for reach in (lambda: download('s3://bucket/file', tmp_path / 'new'),
                  lambda: OutputFolder(tmp_path, 's3://bucket').publish('file'),
                  lambda: VerifiedStream(local=str(tmp_path / 'cache'), remote='s3://bucket').open(),
                  lambda: find_checkpoint('s3://bucket/run', False), lambda: read_latest('s3://bucket/run')):
        with pytest.raises(ConfigError, match='s3://bucket.*: no access .*, expected credentials: AWS_ACCESS_KEY_ID'):
            reach()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError, match=f'{tmp_path}/made: cannot be written .No space left'), \
            atomic_folder(tmp_path / 'made'):
        full()
    with pytest.raises(FileError, match=f'{tmp_path}/made: cannot be written .No space left'), \
            atomic_folder(tmp_path / 'made'):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'source', None, 'copy')  # as shutil.copyfile does
    (tmp_path / 'source').mkdir()
    (tmp_path / 'source/dangling').symlink_to('nowhere')
    with pytest.raises(FileError, match=f'{tmp_path}/made: cannot be written .*No such file'), \
            atomic_folder(tmp_path / 'made') as folder:
        shutil.copytree(tmp_path / 'source', folder / 'copy')
    monkeypatch.setattr(MDSWriter, 'write', full)
    with pytest.raises(FileError, match=f'{tmp_path}/shard.00000.mds: cannot be written .No space left'):
        write_shard(OutputFolder(tmp_path), 0, [{'a': 1}], {'a': 'int'})
    monkeypatch.setattr(CloudDownloader, 'direct_download', full)
    with pytest.raises(FileError, match=f'{tmp_path}/file: cannot be written .No space left'):
        download('s3://bucket/file', tmp_path / 'file')


def test_only_a_folder_that_was_made_is_removed_after_an_error(tmp_path: Path) -> None:
    (tmp_path / 'there').mkdir()
    for name in ('there', 'new'):
        with pytest.raises(KeyboardInterrupt), lock_output(tmp_path / name, 'evaluate'):
            if name == 'new':
                (tmp_path / 'new/checkpoints').mkdir()
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['there'] and not os.listdir(tmp_path / 'there')
