# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Structure of the code: one thought per statement, imports in one direction, and a test file for each module.

`docs/development/contributing.md` and `docs/development/architecture.md` state the rules; ruff checks the rest."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / 'llm2clip').rglob('*.py'))
RECIPES = sorted((ROOT / 'recipes').rglob('*.py'))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# From what uses everything to what uses nothing; packages of one line may use one another in the order given.
LAYERS = [['pipeline'], ['planning', 'search'], ['evaluation'], ['training', 'conversion', 'export'], ['models'],
          ['teacher'], ['data'], ['losses', 'metrics'], ['command'], ['help'], ['registry'], ['config'], ['io'],
          ['modeling'], ['ranks', 'device', 'errors']]
ORDER = [package for layer in LAYERS for package in layer]


def dense_statements(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the kind of every expression that says too much at once."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            yield node.lineno, 'comprehension with two `for`'
        if isinstance(node, ast.IfExp) and sum(isinstance(inner, ast.IfExp) for inner in ast.walk(node)) > 1:
            yield node.lineno, 'conditional expression inside another'
        if isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, ast.IfExp):
            yield node.iter.lineno, '`for` over a conditional expression'
        splats: list[ast.expr] = []
        if isinstance(node, ast.Starred) or isinstance(node, ast.keyword) and node.arg is None:
            splats.append(node.value)
        elif isinstance(node, ast.Dict):
            splats += [value for key, value in zip(node.keys, node.values) if key is None]
        for splat in splats:
            if isinstance(splat, ast.IfExp):
                yield splat.lineno, 'conditional expression after `*` or `**`'


@pytest.mark.parametrize('path', [*MODULES, *RECIPES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_statement_has_one_thought(path: Path) -> None:
    assert list(dense_statements(ast.parse(path.read_text()))) == []


def test_no_module_has_the_name_of_another_one() -> None:
    counts = Counter(path.stem for path in MODULES if path.stem != '__init__')
    assert [name for name, count in counts.items() if count > 1] == []


def test_an_underscore_alone_makes_a_name_private() -> None:
    for path in MODULES:
        assert '__all__' not in path.read_text(), path


def imported_packages(path: Path) -> set[str]:
    """Return the parts of the package that a module imports, inside functions too, but not for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING':
            node.body = []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return {name.split('.')[1] for name in names if name.startswith('llm2clip.')}


def test_imports_never_go_back() -> None:
    for path in MODULES:
        assert not re.search(r'^\s*(from|import) recipes\b', path.read_text(), re.M), path
        package = path.relative_to(ROOT / 'llm2clip').parts[0].removesuffix('.py')
        if package != '__init__':
            back = imported_packages(path) & {*ORDER[:ORDER.index(package)]}
            assert not back, f'{path.relative_to(ROOT)} imports {", ".join(sorted(back))}'


def test_every_module_has_a_test_file() -> None:
    """It stands at the path of the module, or in the table of `tests/README.md`."""
    readme = (ROOT / 'tests/README.md').read_text()
    rows = dict(re.findall(r'^\| `([\w/]+\.py)` \| `([\w/]+\.py)`', readme, re.M))
    modules = {path.relative_to(ROOT / 'llm2clip') for path in MODULES if path.stem != '__init__'}
    without = {str(path) for path in modules if not (ROOT / 'tests' / path.with_name(f'test_{path.name}')).exists()}
    assert sorted(without - rows.keys()) == [], 'neither a test file nor a row in tests/README.md'
    assert sorted(rows.keys() - without) == [], 'rows of modules that have a test file, or do not exist'
    assert [file for file in rows.values() if not (ROOT / 'tests' / file).exists()] == []
