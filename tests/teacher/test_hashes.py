# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Hashes of folders."""

from pathlib import Path

import pytest
from recipes_in_process import run_recipe

from llm2clip.teacher.fingerprint import hash_files


def test_a_folder_has_the_hash_of_what_decides_its_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'model'
    (folder / 'inner').mkdir(parents=True)
    for name, text in {'model.safetensors': 'weights', 'config.json': '{}', 'inner/a.txt': 'a', 'a.png': 'x'}.items():
        (folder / name).write_text(text)
    first = hash_files(folder)
    monkeypatch.chdir(tmp_path)
    (folder / 'a.png').write_text('another picture')
    assert first == hash_files('model') == 'bbd62b6daf7b1415'
    without = hash_files(folder, exclude='config.json')
    (folder / 'config.json').unlink()
    assert without == hash_files(folder) != first
    (folder / 'model.safetensors').write_text('Weights')
    assert hash_files(folder) != without


def test_an_export_has_the_same_hash_each_time(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for _ in range(2):
        run_recipe(monkeypatch, 'export_sentence_transformers', f'teacher={teacher_folder}', f'out={tmp_path}/out')
        hashes.add(hash_files(tmp_path / 'out'))
    assert len(hashes) == 1 and not (tmp_path / 'out/seconds.json').exists()
