# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration.  It also generates a page of keys per recipe and the catalogue of YAML files."""

import ast
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import llm2clip.config  # noqa: E402
from llm2clip.help import entries  # noqa: E402
from llm2clip.registry import PARTS  # noqa: E402

project, author, copyright = 'llm2clip', 'llm2clip authors', '2026, llm2clip authors'
html_title = 'llm2clip'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # a test executes the notebooks
exclude_patterns = ['build']
html_theme = 'furo'
html_static_path = ['figures']
html_theme_options = {'source_repository': '', 'navigation_with_keys': True}
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints = 'description'
suppress_warnings = ['config.cache']
GENERATED = Path(__file__).parent / 'reference/generated'


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx reads its sources."""
    GENERATED.mkdir(exist_ok=True)
    for recipe in sorted((ROOT / 'recipes').glob('*.py')):
        write(GENERATED / f'{recipe.stem}.md', recipe_page(recipe))
    write(GENERATED / 'yamls.md', yaml_page())


def write(path: Path, text: str) -> None:
    """Write a page only if its text has changed, so that Sphinx does not rebuild the others."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def recipe_page(recipe: Path) -> str:
    """Return the page of a recipe: its purpose, its command, and its keys as nested lists."""
    code = recipe.read_text()
    schema = getattr(llm2clip.config, re.findall(r'run_command\((\w+)', code)[0])
    doc = ast.get_docstring(ast.parse(code)) or ''
    description, _, command = ' '.join(doc.split()).partition(': ')
    lines = [f'# {recipe.stem}', '', f'{description}.', '', '```bash', command, '```', '', '## Keys', '',
             'A key without a default is required. `<name>` is a name that you choose; `[]` is one entry of '
             'a list.', '']
    group = ''
    for entry in entries(schema):
        if entry.group != group:
            group = entry.group
            lines += [f'### {group}', '']
        indent = '  ' * entry.depth
        line = f'{indent}- **`{entry.key}`** `{entry.kind}`'
        if entry.default:
            line += f' = `{entry.default}`'
        lines += [line, '']
        if entry.doc:
            lines += [f'{indent}  {escaped(entry.doc)}', '']
    for key, names in PARTS.items():
        if key in schema.__dataclass_fields__:
            lines += ['', f'## Names for {key}', '',
                      f'`--help {key}.NAME` describes one; `module:class` takes your own.', '',
                      ', '.join(f'`{name}`' for name in names)]
    return '\n'.join(lines) + '\n'


def yaml_page() -> str:
    """Return the page of YAML files: one table per folder, with the first sentence of each file's opening
    comment."""
    lines = ['# YAML files', '', 'Each file opens with the command that launches it. '
             '[Settings](../../guides/settings.md) explains how files merge.', '']
    for folder in sorted({path.parent for path in (ROOT / 'yamls').rglob('*.yaml')}):
        lines += [f'## {folder.relative_to(ROOT)}', '', '| file | purpose |', '|---|---|']
        for path in sorted(folder.glob('*.yaml')):
            comment: list[str] = []
            for line in takewhile(lambda line: line.startswith('#'), path.read_text().splitlines()):
                text = line.lstrip('# ')
                if not re.match(r'(composer|python|sky|kubectl|sbatch|RAY_)', text):
                    comment.append(text)
            sentence = re.split(r'(?<=[.;:])\s', ' '.join(comment))[0]
            lines.append(f'| `{path.name}` | {escaped(sentence).replace("|", "&#124;")} |')
        lines.append('')
    return '\n'.join(lines)


def escaped(text: str) -> str:
    """Convert docstring text to Markdown: ``code`` becomes `code`, and other markup characters are
    escaped."""
    parts: list[str] = []
    for part in re.split(r'(``.+?``|`.+?`)', text):
        if part.startswith('`'):
            parts.append(f'`{part.strip("`")}`')
        else:
            parts.append(re.sub(r'([<*_\[\]$])', r'\\\1', part))
    return ''.join(parts)
