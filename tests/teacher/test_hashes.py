# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Hashes of folders, and those that are kept for the next time."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes_in_process import run_recipe

import llm2clip.teacher.fingerprint
from llm2clip.teacher.fingerprint import CACHE_VARIABLE, hash_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's, and a place for hashes; what was written a moment ago counts as settled."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
    monkeypatch.setattr(llm2clip.teacher.fingerprint, '_SETTLED_NS', 0)
    folder = tmp_path / 'model'
    (folder / 'inner').mkdir(parents=True)
    for name, text in {'model.safetensors': 'weights', 'config.json': '{}', 'inner/a.txt': 'a', 'a.png': 'x'}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    opened, names = Path.open, []

    def watched(self: Path, mode: str = 'r', *args: object, **options: object) -> object:
        if mode == 'rb':
            names.append(self.name)
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(Path, 'open', watched)
    return names


def test_a_folder_is_read_once(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = hash_files(folder)
    assert first == 'bbd62b6daf7b1415' and sorted(reads) == ['a.txt', 'config.json', 'model.safetensors']
    assert hash_files(folder) == first and len(reads) == 3
    monkeypatch.chdir(folder.parent)
    assert hash_files('model') == first and len(reads) == 3
    without = hash_files(folder, exclude='config.json')
    assert without != first and len(reads) == 5
    assert hash_files(folder, exclude='config.json') == without and hash_files(folder) == first and len(reads) == 5


def test_an_export_has_the_same_hash_each_time(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for _ in range(2):
        run_recipe(monkeypatch, 'export_sentence_transformers', f'teacher={teacher_folder}', f'out={tmp_path}/out')
        hashes.add(hash_files(tmp_path / 'out'))
    assert len(hashes) == 1 and not (tmp_path / 'out/seconds.json').exists()


def _replace(path: Path) -> None:
    other = path.with_suffix('.new')
    other.write_text('Weights')
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def _rewrite(path: Path) -> None:
    state = path.stat()
    path.write_text('Weights')
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize('change', [
    _rewrite, _replace, lambda path: path.with_name('b.json').touch(),
    lambda path: path.with_name('config.json').unlink()])
def test_a_folder_that_changes_is_read_again(folder: Path, change: Callable[[Path], object]) -> None:
    first = hash_files(folder)
    change(folder / 'model.safetensors')
    assert hash_files(folder) != first


def test_what_changed_just_now_is_not_kept(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the resolution of a file's times, it may change once more and look the same."""
    monkeypatch.setattr(llm2clip.teacher.fingerprint, '_SETTLED_NS', 60 * 10 ** 9)
    assert hash_files(folder) == hash_files(folder) and len(reads) == 6


def test_a_kept_hash_that_is_damaged_or_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hash_files(folder)
    kept, = folder.parent.glob('cache/hashes/*')
    for damage in (b'{', b'\xff\xfe', kept.read_bytes().replace(first.encode(), b'ab')):
        kept.write_bytes(damage)
        assert hash_files(folder) == first
    (tmp_path / 'file').touch()
    for place in (tmp_path / 'file', Path('/proc/nowhere'), Path('relative')):
        monkeypatch.setenv(CACHE_VARIABLE, str(place))
        assert hash_files(folder) == first
    assert not Path('relative').exists()
