# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Parts by name, and parts of the user by `module:class`."""

import sys
from pathlib import Path

import pytest
from recipes_in_process import REQUIRED

from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.registry import build, build_source, check_names


def test_a_part_of_the_user_is_found_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    check_names(load_config(Stage2Config, REQUIRED['train_stage2']))
    assert str(tmp_path) not in sys.path  # unless it is asked for
    Path('own_part.py').write_text('def source(folder: str, seed: int = 0):\n    return folder, seed\n')
    assert build_source({'name': 'own_part:source', 'folder': 'x', 'seed': 3}) == ('x', 3)
    for source, message in (
            ({'name': 'own_part:source', 'sed': 3}, r"source\.sed: .* did you mean 'seed'\?"),
            ({'name': 'own_part:source', 'seed': 'x'}, r"source\.seed: 'x', expected"),
            ({'name': 'own_part:sauce'}, 'source: .*own_part.* has no attribute'),
            ({'name': 'no_such_part:source'}, 'source: .*no_such_part')):
        with pytest.raises(ConfigError, match=message):
            build_source(source)


OWN_PARTS = """from shutil import rmtree
from composer import Callback

class Broken(Callback):
    def __init__(self):
        raise KeyError('x')

def source():
    return 1 / 0
"""


@pytest.mark.parametrize(('kind', 'name', 'message'), [
    ('algorithms', 'os:system', 'os:system, expected'), ('optimizer', 'own_parts:source', 'own_parts:source, expected'),
    ('scheduler', 'own_parts:Broken', 'own_parts:Broken, expected'),
    ('callbacks', 'own_parts:Broken', r'.*own_parts\.py:6: KeyError'), ('callbacks', 'ends:A', r'.*ends\.py:2: System'),
    ('callbacks', 'unfinished:A', r'.*unfinished\.py, line 1'),
    ('source', 'own_parts:source', r'.*own_parts\.py:9: Zero'), ('source', 'own_parts:rmtree', '.*:rmtree, expected'),
    ('zeroshot', 'os:system', 'os:system, expected'), ('source', 'subprocess:call', 'subprocess:call, expected'),
])
def test_a_part_of_another_kind_is_never_called(
    kind: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a module of the user's, and an exit too, is one line with that of the module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'own_parts', raising=False)
    Path('own_parts.py').write_text(OWN_PARTS)
    Path('ends.py').write_text('import sys\nsys.exit()\n')
    Path('unfinished.py').write_text('def part(:\n')
    arguments = {'os:system': {'command': 'touch called'}, 'subprocess:call': {'args': ['touch', 'called']}}
    with pytest.raises(ConfigError, match=f'^{kind}: {message}') as error:
        build(kind, name, arguments.get(name, {}))
    assert not Path('called').exists() and '\n' not in str(error.value)
