# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What --help says: every key once, with type, default and docstring."""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from omegaconf import MISSING, OmegaConf
from recipes_in_process import SCHEMAS, run_recipe

from llm2clip.config import ConfigError
from llm2clip.config.files import load_config
from llm2clip.help import field_docs, help_text


def _keys(text: str) -> list[str]:
    return re.findall(r'^ +(\S+): (?:str|int|float|bool|any|list|dict|mapping|\w+ \|)(?:\W|$)', text, re.M)


def _inside(hint: Any) -> set[Any]:
    """The dataclasses that a type holds, itself included."""
    is_one = dataclasses.is_dataclass(hint)
    parts = typing.get_type_hints(hint).values() if is_one else typing.get_args(hint)
    return {found for part in parts for found in _inside(part)} | ({hint} if is_one else set())


@pytest.mark.parametrize('recipe', SCHEMAS)
def test_every_key_of_a_recipe_appears_once_and_has_a_docstring(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(monkeypatch, recipe, '--help')
    text = capsys.readouterr().out
    keys, schemas = _keys(text), _inside(SCHEMAS[recipe])
    assert len(keys) == len(set(keys)) == sum(len(dataclasses.fields(schema)) for schema in schemas)
    leaves = [key for key in keys if '[]' not in key and not any(other.startswith(f'{key}.') for other in keys)]
    OmegaConf.save(OmegaConf.from_dotlist([f'{key.replace("<name>", "x")}=???' for key in leaves]), tmp_path / 'a.yaml')
    with pytest.raises(ConfigError, match='required but not set'):  # and none of them is unknown
        load_config(SCHEMAS[recipe], [str(tmp_path / 'a.yaml')])
    for schema in schemas:
        hints = typing.get_type_hints(schema)
        assert [name for name in hints if not _inside(hints[name]) and name not in field_docs(schema)] == []
    # What it does, and how it is called.
    assert re.search(rf'\A\S.*\.\n\n  (python|composer) .*recipes/{recipe}\.py', text)


@dataclass
class _Inner:
    """What an inner one is.

    And more.
    """

    size: int = 3
    """Its size,
    in pixels."""
    names: list[str] = field(default_factory=lambda: ['a', 'b'])


@dataclass
class _Outer(_Inner):
    path: str = MISSING
    """Where."""
    inner: _Inner = field(default_factory=_Inner)
    several: dict[str, _Inner] = field(default_factory=dict)
    """Name -> inner one."""
    pairs: Optional[list[_Inner]] = None
    kind: Optional[Literal['one', 'other']] = None


def test_types_defaults_and_docstrings_of_nested_keys() -> None:
    text = help_text(_Outer, 'Tries it:\npython recipes/try.py [key=value …]')
    assert text.startswith('Tries it.\n\n  python recipes/try.py [key=value …]\n\nYAML files merge')
    assert text[text.index('\n  size'):] == '''
  size: int = 3
      Its size, in pixels.
  names: list[str] = [a, b]
  path: str
      Where.
  inner: mapping
      What an inner one is.
    inner.size: int = 3
        Its size, in pixels.
    inner.names: list[str] = [a, b]
  several: dict[str, mapping] = {}
      Name -> inner one. Its keys are those of inner.
  pairs: list[mapping] = null
      What an inner one is. Its keys are those of inner.
  kind: one | other = null'''
