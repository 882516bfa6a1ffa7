# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration.  It also generates a page of keys per recipe and the catalogue of YAML files."""

import ast
import html
import os
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from docutils import nodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import llm2clip.config  # noqa: E402
from llm2clip.help import Entry, entries  # noqa: E402
from llm2clip.registry import PARTS  # noqa: E402

project, author, copyright = 'llm2clip', 'llm2clip authors', '2026, llm2clip authors'
html_title = 'llm2clip'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # a test executes the notebooks
exclude_patterns = ['build']
html_theme = 'furo'
html_baseurl = os.environ.get('DOCS_URL', '')  # https://…/, where the site is published
html_static_path = ['figures', 'static']
html_css_files = ['site.css']
html_favicon = 'static/favicon.svg'
html_theme_options = {'source_repository': '', 'navigation_with_keys': True}
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints = 'description'
suppress_warnings = ['config.cache']
GENERATED = Path(__file__).parent / 'reference/generated'


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx reads its sources, and connect what follows."""
    GENERATED.mkdir(exist_ok=True)
    for recipe in sorted((ROOT / 'recipes').glob('*.py')):
        write(GENERATED / f'{recipe.stem}.md', recipe_page(recipe))
    write(GENERATED / 'yamls.md', yaml_page())
    if app:
        app.connect('source-read', add_navigation)
        app.connect('doctree-read', link_keys)
        app.connect('html-page-context', add_meta_tags)


def add_navigation(app: Any, docname: str, source: list[str]) -> None:
    """Append a hidden toctree for each list of links below a heading of the index or the page of recipes.

    The pages therefore list their links once, and GitHub shows them.  The site leaves out the index's list,
    which is the sidebar's.
    """
    if docname not in ('index', 'reference/recipes'):
        return
    lines = [source[0].partition('## All pages')[0]]
    for caption, links in re.findall(r'^##+ (.+)\n\n((?:- \[.*\n)+)', source[0], re.M):
        pages = re.findall(r'^- \[.*?\]\((.+?)\.\w+\)', links, re.M)
        lines += ['', '```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```', '']
    source[0] = '\n'.join(lines)


def link_keys(app: Any, doctree: nodes.document) -> None:
    """Let pages link to the keys of the generated pages, as in ``train_stage2.md#train_data.streams``."""
    metadata = app.env.metadata[app.env.docname]
    for anchor in doctree.findall(nodes.raw):
        match = re.match('<a id="(.+?)"', anchor.astext())
        if match:
            metadata['myst_slugs'][match[1]] = (anchor.line, match[1], match[1])


def add_meta_tags(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Describe a page to search engines and link previews by its title and first paragraph."""
    if doctree is None:
        return
    description = ' '.join(next(doctree.findall(nodes.paragraph)).astext().split())
    tags = {'name="description"': description, 'property="og:description"': description,
            'property="og:title"': re.sub('<.*?>', '', context['title']), 'property="og:type"': 'website'}
    if html_baseurl:
        tags['property="og:url"'] = context['pageurl']
        tags['property="og:image"'] = f'{html_baseurl}_static/retrieval.png'
    if html_baseurl and page == '404':  # it is shown at any address, so its links cannot be relative
        context['metatags'] += f'<base href="{html_baseurl}">'
    for name, content in tags.items():
        context['metatags'] += f'\n<meta {name} content="{html.escape(html.unescape(content))}">'


def write(path: Path, text: str) -> None:
    """Write a page only if its text has changed, so that Sphinx does not rebuild the others."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def recipe_page(recipe: Path) -> str:
    """Return the page of a recipe: its purpose, its command, and a table of keys per group and per key with
    keys below it."""
    code = recipe.read_text()
    schema = getattr(llm2clip.config, re.findall(r'run_command\((\w+)', code)[0])
    doc = ast.get_docstring(ast.parse(code)) or ''
    description, _, command = ' '.join(doc.split()).partition(': ')
    lines = [f'# {recipe.stem}', '', f'{description}.', '', '```bash', folded(command), '```', '',
             'A key without a default is required. `<name>` is a name that you choose; `[]` is one entry of '
             'a list.', '']
    tables: dict[str, list[str]] = {}
    anchors: set[str] = set()
    for entry in entries(schema):
        heading = f'## {entry.group}'
        if entry.depth:
            heading = f'### `{entry.key.rpartition(".")[0]}`'
        tables.setdefault(heading, []).append(key_row(entry, anchors))
    for heading, rows in tables.items():
        lines += [heading, '', '| key | type = default | meaning |', '|---|---|---|', *rows, '']
    for key, names in PARTS.items():
        if key in schema.__dataclass_fields__:
            lines += [f'## Names for {key}', '',
                      f'`--help {key}.NAME` describes one; `module:class` takes your own.', '',
                      ', '.join(f'`{name}`' for name in names), '']
    return '\n'.join(lines)


def key_row(entry: Entry, anchors: set[str]) -> str:
    """Return a key as a row of a table.  Its first mention has an anchor, without `[]` and `<name>`.  A long
    key breaks after a dot."""
    anchor = entry.key.replace('[]', '').replace('.<name>', '')
    link = f'<a href="#{anchor}">'
    if anchor not in anchors:
        anchors.add(anchor)
        link = f'<a id="{anchor}" href="#{anchor}">'
    key = html.escape(entry.key).replace('.', '.<wbr>')
    kind = f'`{entry.kind}`'
    if entry.default:
        kind += f' = `{entry.default}`'
    return row(f'{link}<code>{key}</code></a>', kind, escaped(entry.doc))


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    text = ' | '.join(cell.replace('|', '\\|') for cell in cells)
    return f'| {text} |'


def folded(command: str) -> str:
    """Break a command at spaces outside quotes into lines of at most 92 columns."""
    lines = ['']
    for word in re.findall(r"(?:'[^']*'|\S)+", command):
        if len(f'{lines[-1]} {word}') > 90:
            lines.append('   ')
        lines[-1] += f' {word}'
    return ' \\\n'.join(lines).strip()


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
            lines.append(row(f'`{path.name}`', escaped(sentence)))
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
