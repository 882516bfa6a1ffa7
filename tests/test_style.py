# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""One thought per statement, as `docs/development/contributing.md` asks.  Ruff checks the length of lines."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / 'llm2clip').rglob('*.py'))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def dense_statements(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the kind of every expression that says too much at once."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            yield node.lineno, 'comprehension with two `for`'
        if isinstance(node, ast.IfExp):
            for inner in ast.walk(node):
                if isinstance(inner, ast.IfExp) and inner is not node:
                    yield node.lineno, 'conditional expression inside another'
        if isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, ast.IfExp):
            yield node.iter.lineno, '`for` over a conditional expression'
        splats: list[ast.expr] = []
        if isinstance(node, ast.Starred):
            splats.append(node.value)
        elif isinstance(node, ast.Dict):
            splats += [value for key, value in zip(node.keys, node.values) if key is None]
        elif isinstance(node, ast.Call):
            splats += [keyword.value for keyword in node.keywords if keyword.arg is None]
        for splat in splats:
            if isinstance(splat, ast.IfExp):
                yield splat.lineno, 'conditional expression after `*` or `**`'


@pytest.mark.parametrize('path', [*MODULES, *sorted((ROOT / 'recipes').rglob('*.py'))],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_a_statement_has_one_thought(path: Path) -> None:
    assert list(dense_statements(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize('code', [
    'f(x for y in z for x in y)', '{a: b for c in d for a, b in c}', 'x = a if b else c if d else e',
    'for x in (a if b else c): pass', '[x for x in (a if b else c)]', 'f(*(a if b else c))',
    'f(**({} if a else b))', '{**({} if a else b)}'])
def test_what_is_dense_is_found(code: str) -> None:
    assert len(list(dense_statements(ast.parse(code)))) == 1


def test_no_module_has_the_name_of_another_one() -> None:
    names = [path.stem for path in MODULES if path.stem != '__init__']
    counts = Counter(names)
    assert [name for name, count in counts.items() if count > 1] == []


def test_an_underscore_alone_makes_a_name_private() -> None:
    for path in MODULES:
        assert '__all__' not in path.read_text(), path
