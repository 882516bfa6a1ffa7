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
LAYERS = [['pipeline'], ['planning', 'search'], ['evaluation'], ['training', 'official', 'export'], ['models'],
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


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the name that an import binds, and the dotted name of what it imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split('.')[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f'{node.module}.{alias.name}'


def imported_packages(path: Path) -> set[str]:
    """Return the parts of the package that a module imports, but not for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING':
            node.body = []
    return {name.split('.')[1] for _, name in imports(tree) if name.startswith('llm2clip.')}


def test_imports_never_go_back() -> None:
    for path in MODULES:
        assert not re.search(r'^\s*(from|import) recipes\b', path.read_text(), re.M), path
        package = path.relative_to(ROOT / 'llm2clip').parts[0].removesuffix('.py')
        if package != '__init__':
            back = imported_packages(path) & {*ORDER[:ORDER.index(package)]}
            assert not back, f'{path.relative_to(ROOT)} imports {", ".join(sorted(back))}'


def test_ranks_and_device_are_the_only_doors_to_those_of_composer() -> None:
    doors = re.compile(r'composer\.(devices|utils\.(dist|get_device|device)|core\.get_precision_context)\b')
    for path in [*MODULES, *RECIPES]:
        passed = [name for _, name in imports(ast.parse(path.read_text())) if doors.match(name)]
        assert not passed or path.name in ('ranks.py', 'device.py'), f'{path} imports {passed}'


def members_of_libraries(tree: ast.AST) -> set[str]:
    """Return the names with an underscore that a module uses of libraries, and the names that it replaces there."""
    members: set[str] = set()
    libraries: set[str] = set()
    for bound, name in imports(tree):
        if not name.startswith(('llm2clip', 'recipes')):
            libraries.add(bound)
            members.update(part for part in name.split('.') if part.startswith('_'))
    defined = {'_exit', '_replace', 'allow_tf32', 'unraisablehook'}  # not here, but documented
    read_of_self: set[str] = set()
    set_on_self: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            set_on_self.add(node.id)  # by the body of a class
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'getattr':
            members.update(re.findall(r"^'(_\w+)'$", ast.unparse(node.args[1])))
        elif isinstance(node, ast.Attribute):
            is_set = isinstance(node.ctx, ast.Store)
            owner = ast.unparse(node.value)
            is_module = owner.replace('.', '').isidentifier() and owner.split('.')[0] in libraries
            if owner == 'self':
                (set_on_self if is_set else read_of_self).add(node.attr)
            elif node.attr.startswith('_') or is_set and is_module:
                members.add(node.attr)
    members |= {name for name in read_of_self - set_on_self if name.startswith('_')}
    return {name for name in members - defined if not name.startswith('__')}


def test_private_and_replaced_members_of_libraries_are_listed() -> None:
    page = (ROOT / 'docs/development/contributing.md').read_text()
    listed: dict[str, set[str]] = {}
    for members, modules in re.findall(r'^\| \w+, (`.*?) \| (`.*?) \| ', page, re.M):
        for module in re.findall(r'`(.*?)`', modules):
            listed.setdefault(module, set()).update(re.findall(r'`(\w+)`', members))
    for path in [*MODULES, *RECIPES]:
        text = path.read_text()
        names = tuple(listed.pop(str(path.relative_to(ROOT)), []))
        unlisted = [name for name in members_of_libraries(ast.parse(text)) if not name.startswith(names)]
        assert not unlisted, f'contributing.md does not list {unlisted} of {path}'
        unused = [name for name in names if not re.search(rf'\b{name}', text)]
        assert not unused, f'contributing.md lists {unused}, which {path} does not use'
    assert not listed, 'contributing.md lists modules that do not exist'


def test_every_module_has_a_test_file() -> None:
    """It stands at the path of the module, or in the table of `tests/README.md`."""
    readme = (ROOT / 'tests/README.md').read_text()
    rows = dict(re.findall(r'^\| `([\w/]+\.py)` \| `([\w/]+\.py)`', readme, re.M))
    modules = {path.relative_to(ROOT / 'llm2clip') for path in MODULES if path.stem != '__init__'}
    without = {str(path) for path in modules if not (ROOT / 'tests' / path.with_name(f'test_{path.name}')).exists()}
    assert sorted(without - rows.keys()) == [], 'neither a test file nor a row in tests/README.md'
    assert sorted(rows.keys() - without) == [], 'rows of modules that have a test file, or do not exist'
    assert [file for file in rows.values() if not (ROOT / 'tests' / file).exists()] == []
