# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which files of a folder are images."""

from pathlib import Path

import pytest

from llm2clip.config import ConfigError
from llm2clip.search.files import find_images


def test_images_are_found_by_suffix_in_every_folder_once(tmp_path: Path) -> None:
    names = ['b.JPG', 'a/c.png', 'a/b/d.webp', 'notes.txt', 'README', 'e.heic', '.hidden.png', '.git/f.png']
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'12345')
    (tmp_path / 'a/loop').symlink_to(tmp_path)
    (tmp_path / 'broken.png').symlink_to(tmp_path / 'nowhere')
    found = find_images(tmp_path)
    assert list(found.images) == ['a/b/d.webp', 'a/c.png', 'b.JPG']
    state = found.images['b.JPG']
    assert state.size == 5 and state.mtime_ns == (tmp_path / 'b.JPG').stat().st_mtime_ns
    assert found.others == {'.txt': 1, 'no suffix': 1, '.heic': 1, 'broken link': 1}


def test_a_folder_outside_is_searched_through_its_link(tmp_path: Path) -> None:
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere/a.png').touch()
    (tmp_path / 'photos/link').symlink_to(tmp_path / 'elsewhere')
    assert list(find_images(tmp_path / 'photos').images) == ['link/a.png']


def test_no_folder_and_no_images_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='images: there is no folder .*/none'):
        find_images(tmp_path / 'none')
    with pytest.raises(ConfigError, match='images: no image in .*expected files that end in .*, found no file'):
        find_images(tmp_path)
    (tmp_path / 'a.heic').touch()
    with pytest.raises(ConfigError, match='found 1 .heic'):
        find_images(tmp_path)
