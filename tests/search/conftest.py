# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An exported model, a folder of pictures, and which of them are read."""

from pathlib import Path

import pytest
import torch
from search_folders import write_export, write_photo

import llm2clip.search.exported as exported


@pytest.fixture(scope='session')
def model_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp('export') / 'llm2clip', teacher_folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures, the odd ones in a folder inside."""
    folder = tmp_path / 'photos'
    (folder / 'odd').mkdir(parents=True)
    for i in range(8):
        write_photo(folder / f'{"odd/" if i % 2 else ""}{i}.png', i)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the path of each image that this process decodes."""
    paths: list[str] = []
    decode = exported.decode_pixels

    def noted(data: bytes, path: str) -> torch.Tensor:
        paths.append(path)
        return decode(data, path)

    monkeypatch.setattr(exported, 'decode_pixels', noted)
    return paths
