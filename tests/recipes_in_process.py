# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Recipes as a user calls them, but in the process of the tests."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from streaming.base.util import clean_stale_shared_memory

import llm2clip.config

ROOT = Path(__file__).parents[1]
# Recipe -> the type of its configuration.
SCHEMAS = {path.stem: getattr(llm2clip.config, re.findall(r'run_command\((\w+)', path.read_text())[0])
           for path in sorted((ROOT / 'recipes').glob('*.py'))}


def run_recipe(monkeypatch: pytest.MonkeyPatch, name: str, *args: str) -> None:
    monkeypatch.setenv('LLM2CLIP_TRACEBACK', '1')  # errors as they are raised
    monkeypatch.setattr(sys, 'argv', [f'recipes/{name}.py', *args])
    runpy.run_path(str(ROOT / 'recipes' / f'{name}.py'), run_name='__main__')
    clean_stale_shared_memory()
