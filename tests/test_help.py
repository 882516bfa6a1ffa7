# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What --help says: every key once, with type, default and docstring."""

import ast
import dataclasses
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from recipes_in_process import SCHEMAS, run_recipe

from llm2clip.config.loading import load_config
from llm2clip.config.teacher import teacher_types
from llm2clip.errors import ConfigError
from llm2clip.help import entries, field_docs, help_text

ROOT = Path(__file__).parents[1]


def _doc(recipe: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / f'recipes/{recipe}.py').read_text())) or ''


def _keys(text: str) -> list[str]:
    return re.findall(r'^ +(\S+): (?:str|int|float|bool|any|list|dict|mapping|\w+ \|)(?:\W|$)', text, re.M)


def _inside(hint: Any) -> set[Any]:
    """The dataclasses that a type holds, itself and types of text encoders included."""
    is_one = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    parts = typing.get_type_hints(hint, include_extras=True).values() if is_one else [
        *teacher_types(hint).values(), *typing.get_args(hint)]
    return {found for part in parts for found in _inside(part)} | ({hint} if is_one else set())


@pytest.mark.parametrize('recipe', SCHEMAS)
def test_every_key_of_a_recipe_appears_once_and_has_a_docstring(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(monkeypatch, recipe, '--help')
    text = capsys.readouterr().out
    keys, schemas = _keys(text), _inside(SCHEMAS[recipe])
    assert len(keys) == sum(field.name != 'type' for schema in schemas for field in dataclasses.fields(schema))
    assert all('teacher.' in key for key in keys if keys.count(key) > 1)  # that several types of text encoders have
    leaves = [key for key in keys if '[]' not in key and not any(other.startswith(f'{key}.') for other in keys)]
    OmegaConf.save(OmegaConf.from_dotlist([f'{key.replace("<name>", "x")}=???' for key in leaves]), tmp_path / 'a.yaml')
    with pytest.raises(ConfigError, match='required but not set'):  # and none of them is unknown
        load_config(SCHEMAS[recipe], [str(tmp_path / 'a.yaml')])
    for schema in schemas:
        hints = {field.name: field.type for field in dataclasses.fields(schema) if field.name != 'type'}
        assert [name for name in hints if not _inside(hints[name]) and name not in field_docs(schema)] == []
    # What it does, and how it is called.
    assert re.search(rf'\A\S.*\.\n\n  (python|composer) .*recipes/{recipe}\.py', text)


@pytest.mark.parametrize('recipe', SCHEMAS)
def test_the_command_in_the_help_can_be_copied(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = help_text(SCHEMAS[recipe], _doc(recipe)).splitlines()[2]
    program, script, *args = shlex.split(command)
    assert (program, script) == ('python', f'recipes/{recipe}.py')
    load_config(SCHEMAS[recipe], args)


def test_required_keys_come_first_and_the_others_in_groups() -> None:
    groups: dict[str, list[str]] = {}
    for entry in entries(SCHEMAS['train_stage2']):
        if not entry.depth:
            groups.setdefault(entry.group, []).append(entry.key)
    first, second, *others = groups
    assert first == 'Required' and second == 'Optional' and len(others) == 4
    assert groups['Required'] == ['save_folder', 'run_name', 'max_duration', 'global_train_batch_size', 'optimizer',
                                  'model']
    assert 'loss' in groups['Optional'] and any('plan' in groups[other] for other in others)
    vision = [entry for entry in entries(SCHEMAS['train_stage2']) if entry.key.startswith('model.vision.')]
    assert vision[0].key == 'model.vision.name' and not vision[0].default


def test_help_about_a_key_prints_that_part() -> None:
    schema = SCHEMAS['train_stage2']
    text = help_text(schema, _doc('train_stage2'), ['--help', 'model.vision', 'yamls/quickstart/steps.yaml'])
    keys = _keys(text)
    assert keys[:2] == ['model.vision', 'model.vision.name']
    assert all(f'{key}.'.startswith('model.vision.') for key in keys) and 'model.vision.lora.r' in keys
    assert 'cosine_with_warmup' in help_text(schema, '', ['scheduler', '--help'])
    assert _keys(help_text(schema, '', ['train_data.streams.local'])) == ['train_data.streams.<name>.local']
    with pytest.raises(ConfigError, match="no key 'mdel'; did you mean 'model'"):
        help_text(schema, '', ['--help', 'mdel'])
