# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Parts by name, and parts of the user by `module:class`."""

import sys
from pathlib import Path
from typing import Any

import pytest
from recipes_in_process import REQUIRED

from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.registry import build, build_source, check_names

MODULES = {'own_parts': """from shutil import rmtree
from composer import Callback

class Broken(Callback):
    def __init__(self):
        raise KeyError('x')

def source(folder: str, seed: int = 0):
    return folder, 1 / seed
""", 'ends': 'import sys\nsys.exit()\n', 'unfinished': 'def part(:\n'}


@pytest.fixture(autouse=True)
def _own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.delitem(sys.modules, 'own_parts', raising=False)
    for name, text in MODULES.items():
        Path(f'{name}.py').write_text(text)


def test_a_part_of_the_current_folder_is_found(tmp_path: Path) -> None:
    check_names(load_config(Stage2Config, REQUIRED['train_stage2']))
    assert str(tmp_path) not in sys.path  # unless a name asks for it
    assert build_source({'name': 'own_parts:source', 'folder': 'x', 'seed': 2}) == ('x', 0.5)


@pytest.mark.parametrize(('kind', 'name', 'arguments', 'key', 'message'), [
    ('source', 'own_parts:source', {'sed': 3}, 'source.sed', "did you mean 'seed'?"),
    ('source', 'own_parts:source', {'seed': 'x'}, 'source.seed', "'x', expected"),
    ('source', 'own_parts:source', {'folder': 'x'}, 'source', 'own_parts.py:9: ZeroDivisionError'),
    ('source', 'own_parts:sauce', {}, 'source', 'has no attribute'), ('source', 'no_part:a', {}, 'source', 'no_part'),
    ('callbacks', 'own_parts:Broken', {}, 'callbacks', 'own_parts.py:6: KeyError'),
    ('callbacks', 'ends:A', {}, 'callbacks', 'ends.py:2: SystemExit'),
    ('callbacks', 'unfinished:A', {}, 'callbacks', 'unfinished.py, line 1'),
    # Parts of another kind, and functions that are none, are never called.
    ('optimizer', 'own_parts:source', {}, 'optimizer', 'own_parts:source, expected'),
    ('scheduler', 'own_parts:Broken', {}, 'scheduler', 'own_parts:Broken, expected'),
    ('source', 'own_parts:rmtree', {'path': '.'}, 'source', 'own_parts:rmtree, expected'),
    ('algorithms', 'os:system', {'command': 'touch called'}, 'algorithms', 'os:system, expected'),
    ('zeroshot', 'os:system', {'command': 'touch called'}, 'zeroshot', 'os:system, expected'),
    ('source', 'subprocess:call', {'args': ['touch', 'called']}, 'source', 'subprocess:call, expected'),
])
def test_an_unusable_part_is_named(kind: str, name: str, arguments: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(kind, name, arguments)
    assert error.value.key == key and message in str(error.value) and '\n' not in str(error.value)
    assert not Path('called').exists() and Path('own_parts.py').exists()
