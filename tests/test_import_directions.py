# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which way imports go, as `docs/development/architecture.md` shows it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From what uses everything to what uses nothing; packages of one line may use one another in the order given.
LAYERS = [['planning', 'search'], ['evaluation'], ['training', 'conversion', 'export'], ['models'], ['teacher'],
          ['data'], ['losses', 'metrics'], ['command'], ['help'], ['engine', 'registry'], ['config'], ['io'],
          ['modeling'], ['ranks', 'device', 'errors']]
ORDER = [package for layer in LAYERS for package in layer]


def imported(path: Path) -> set[str]:
    """Packages of the package that a module imports, inside functions too, but not for the type checker alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING':
            node.body = []
    names = [alias.name if isinstance(node, ast.Import) else f'{node.module}.{alias.name}'
             for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    return {name.split('.')[1] for name in names if name.startswith('llm2clip.')}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / 'llm2clip' / package).rglob('*.py')) or [ROOT / f'llm2clip/{package}.py']


def test_every_package_has_its_place() -> None:
    there = {path.stem for path in (ROOT / 'llm2clip').iterdir()
             if path.suffix == '.py' or (path / '__init__.py').exists()}
    assert there - {'__init__'} == {*ORDER}


@pytest.mark.parametrize('package', ORDER)
def test_imports_never_go_back(package: str) -> None:
    for path in modules(package):
        back = imported(path) & {*ORDER[:ORDER.index(package)]}
        assert not back, f'{path.relative_to(ROOT)} imports {", ".join(sorted(back))}'


def test_nobody_imports_a_recipe() -> None:
    for path in (ROOT / 'llm2clip').rglob('*.py'):
        assert not re.search(r'^\s*(from|import) recipes\b', path.read_text(), re.M), path
