# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The members of mosaicml-streaming that `llm2clip.data.streams` overrides, and the private ones that it uses.

That they do what they should is tested in `test_safe_dataset.py`.
"""

import ast
import inspect
from pathlib import Path

import pytest
import streaming

from llm2clip.data.streams.paired_stream import PairedReader, PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize('repaired', [SafeDataset, VerifiedStream, PairedStream, PairedReader])
def test_overridden_members_exist_and_take_the_same(repaired: type) -> None:
    ours = [base for base in repaired.__mro__ if base.__module__.startswith('llm2clip')]
    upstream = next(base for base in repaired.__mro__ if base.__module__.startswith('streaming'))
    for name in {name for base in ours for name in vars(base)} & set(dir(upstream)):
        if inspect.isfunction(function := getattr(upstream, name)) and name != '__init__':
            assert list(inspect.signature(getattr(repaired, name)).parameters) == \
                list(inspect.signature(function).parameters), name


def _private_names(path: Path) -> set[str]:
    """Names with one underscore that a module asks for as an attribute, defines, or imports from Streaming."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('streaming'):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith('_') and not name.startswith('__')}


def test_nothing_else_touches_what_is_private_in_streaming() -> None:
    upstream = set()
    for path in Path(streaming.__file__).parent.joinpath('base').rglob('*.py'):
        upstream |= _private_names(path)
    touched = {str(path.relative_to(ROOT)): names for folder in ('llm2clip', 'recipes')
               for path in sorted((ROOT / folder).rglob('*.py')) if 'streaming' in path.read_text()
               if (names := _private_names(path) & upstream)}
    assert touched == {'llm2clip/data/streams/safe_dataset.py': {
        '_ready_thread', '_shard_states', '_ShardState', '_shm_prefix_int'}}
