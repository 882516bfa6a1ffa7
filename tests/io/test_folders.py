# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A folder is replaced as a whole, only by one of the same kind, and nothing is lost on the way."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Optional

import pytest

from llm2clip.errors import ConfigError, FileError
from llm2clip.io import folders
from llm2clip.io.folders import MANIFEST, atomic_folder, inside, lock_output, locked


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


def test_any_other_folder_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('run/checkpoints', 'blocked.tmp/mine'):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / 'teacher', 'text', 'teacher')
    write(tmp_path / 'linked', 'text')
    (tmp_path / 'linked/inside/link').symlink_to(tmp_path)
    write(tmp_path / 'changed', 'text')
    (tmp_path / 'changed/inside/weights').write_text('other text')
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for name, reason in (('run', f'not replaced by a new model: it has no {MANIFEST} .*in it: checkpoints'),
                         ('teacher', f'it has no {MANIFEST}'), ('linked', 'inside/link has been put into it'),
                         ('changed', 'inside/weights has been put into it or changed'), ('.', 'is there already'),
                         ('blocked', 'blocked.tmp is in the way')):
        with pytest.raises(ConfigError, match=reason):
            write(Path(name), 'new')
    assert contents(tmp_path) == before and Path('blocked.tmp/mine').is_dir()


def test_a_file_that_is_added_meanwhile_is_kept(tmp_path: Path) -> None:
    write(tmp_path / 'out', 'first')
    with pytest.raises(ConfigError, match='notes has been put into it'), atomic_folder(tmp_path / 'out', 'model'):
        (tmp_path / 'out/notes').touch()
    assert sorted(os.listdir(tmp_path / 'out')) == [MANIFEST, 'inside', 'notes']


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_a_kill_during_the_exchange_loses_nothing(
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
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, 'model') as partial:
        (partial / 'weights').touch()
        raise KeyboardInterrupt  # which changes nothing
    assert (out / 'inside/weights').read_text() == ('second' if renames == 2 else 'first')
    assert os.listdir(tmp_path) == ['out']


def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder/up').symlink_to('..')
    (tmp_path / 'folder/out').symlink_to('/etc/hostname')
    (tmp_path / 'link').symlink_to('folder')
    for folder in ('folder', 'link'):
        for name in ('../b', '/etc/hostname', 'up/b', 'out'):
            with pytest.raises(FileError, match=f'c.csv: .* leads to .*, expected one inside {tmp_path}/{folder}'):
                inside(tmp_path / folder, name, 'c.csv')
            assert name not in ('../b', 'up/b') or inside(tmp_path / folder, name, 'c.csv', [str(tmp_path)])
        for name in ('a/b', './a', 'a/../b', 'up/folder/a', '...'):
            assert inside(tmp_path / folder, name, 'c.csv') == tmp_path / folder / name
            assert inside(tmp_path / folder, f'{tmp_path}/{folder}/{name}', 'c.csv') == tmp_path / folder / name

    assert inside('/', '/etc/hostname', 'c.csv') == Path('/etc/hostname')


def test_only_a_new_folder_is_removed_after_an_error(tmp_path: Path) -> None:
    (tmp_path / 'there').mkdir()
    for name in ('there', 'new'):
        with pytest.raises(KeyboardInterrupt), lock_output(tmp_path / name, 'evaluate'):
            if name == 'new':
                (tmp_path / 'new/checkpoints').mkdir()
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['there'] and not os.listdir(tmp_path / 'there')


def test_the_lock_of_a_process_that_ends_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context('fork')
    holds = context.Event()

    def hold() -> None:
        with locked(tmp_path / 'lock', tmp_path):
            holds.set()
            signal.pause()

    process = context.Process(target=hold, daemon=True)
    process.start()
    assert holds.wait(60)
    said: list[str] = []

    def note(text: str, **options: object) -> None:
        said.append(text)
        process.kill()  # after the first attempt

    monkeypatch.setattr(folders, 'print', note, raising=False)
    with locked(tmp_path / 'lock', tmp_path):
        assert len(said) == 1 and f'{tmp_path}/lock' in said[0]
        with pytest.raises(ConfigError, match=f'{tmp_path}: another process'), \
                locked(tmp_path / 'lock', tmp_path, timeout=0.01):
            pass
    process.join()


def test_a_torn_record_belongs_to_nobody(tmp_path: Path) -> None:
    record = tmp_path / '.llm2clip'
    for torn in ('', 'train_st', 'evaluate', 'train_inherita'):
        record.write_text(torn)
        with lock_output(tmp_path, 'evaluate'):
            assert record.read_text() == 'evaluate\n'
            (tmp_path / 'results.json').touch()
    with pytest.raises(ConfigError, match='was written by evaluate'), lock_output(tmp_path, 'search'):
        pass


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / 'teacher').mkdir()
    leftovers = [
        'best.safetensors.12.tmp', '.tmpAb3dEf', 'checkpoints/.0123456789abcdef0123456789abcdef',
        '.staging.12.host/train/part.json', 'train/.index.json.12.part/index.json', 'train/shard.00000.mds.12.tmp',
        'teacher.tmp/old/weights', 'teacher.tmp/new/weights']
    kept = ['.llm2clip', 'best.safetensors', 'notes.tmp', '12.tmp', 'mine.tmp/new/a', 'mine.tmp/b', 'lora/weights',
            'other/.llm2clip', 'other/a.12.tmp', 'cache/.in_use', 'cache/.index.json.12.part/a', '.exported.lock',
            'exported.tmp/new/a']
    interrupted = 'lora.tmp/old/weights'  # between two renames: it is the only copy
    for name in [*leftovers, *kept, interrupted]:
        if name != 'lora/weights':
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    (tmp_path / '.llm2clip').write_text('train\n')
    before = contents(tmp_path).keys()
    with lock_output(tmp_path, 'train', part=0):
        assert contents(tmp_path).keys() == before
    with lock_output(tmp_path, 'train'):
        assert contents(tmp_path).keys() == {*kept}
        assert not [*tmp_path.glob('teacher.tmp'), *tmp_path.glob('.staging*'), *tmp_path.glob('lora.tmp')]


@pytest.mark.parametrize('names', [None, ['report.html']])
def test_files_of_the_user_in_an_output_folder_stay(names: Optional[list[str]], tmp_path: Path) -> None:
    """A recipe that writes a few files may share a folder, and a new folder may have hidden files."""
    mine = [f'.{"a" * 32}', '.tmpAb3dEf', '.hidden/notes.12.tmp']
    if names is not None:
        mine += ['notes.12.tmp', 'photos/notes.12.tmp', 'photos/work.tmp/new/a', '.staging.12.host/a']
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with lock_output(tmp_path, 'report', names):
        (tmp_path / 'report.html').touch()
    assert {*mine} < contents(tmp_path).keys()
    if names is None:
        return
    for partial in ('report.html.12.tmp', 'seconds.json.12.tmp'):
        (tmp_path / partial).touch()
    with lock_output(tmp_path, 'report', names):
        assert contents(tmp_path).keys() == {*mine, 'report.html', '.llm2clip'}
