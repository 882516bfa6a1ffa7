# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The pages for people: their commands load, their links lead somewhere, and the files that they name are there."""

import re
import shlex
from pathlib import Path

import pytest
from recipes_in_process import ROOT, SCHEMAS

from llm2clip.config.files import load_config

PAGES = ['README.md', 'recipes/README.md', 'yamls/README.md', 'llm2clip/README.md', '.github/CONTRIBUTING.md']


def _commands(text: str) -> list[list[str]]:
    """The calls of recipes in a page's code, from the recipe on."""
    blocks = ''.join(re.findall(r'```bash\n(.*?)```', text, re.S)).replace('\\\n', ' ')
    calls = [shlex.split(line) for line in blocks.splitlines() if ' recipes/' in line]
    return [call[next(i for i, word in enumerate(call) if word.startswith('recipes/')):] for call in calls]


def _anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r'^#+ (.*)', page.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_commands_load(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for recipe, *args in _commands((ROOT / page).read_text()):
        if '--help' not in args:
            load_config(SCHEMAS[Path(recipe).stem], [arg for arg in args if arg != 'mine.yaml'])


@pytest.mark.parametrize('page', PAGES)
def test_links_and_names_of_files(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r'\]\(([^)]+)\)', text):
        path, _, anchor = link.partition('#')
        if '://' not in link:
            target = folder / path if path else ROOT / page
            assert target.exists() and (not anchor or anchor in _anchors(target)), link
    names = {name for name in re.findall(r'`([\w.-]+(?:/[\w.-]+)*/?)`', text)
             if name.split('/')[0] in ('recipes', 'yamls', 'llm2clip', 'tests')
             or re.search(r'./.*\.(py|yaml|sbatch)$|\.py$', name)}
    for name in names:
        assert (ROOT / name).exists() or (folder / name).exists(), f'{page} names {name}, which is not there'


def test_the_first_page_is_short_and_every_package_is_described() -> None:
    assert (ROOT / 'README.md').read_text().count('\n') <= 180
    packages = set(re.findall(r'`([\w.]+/?)`', (ROOT / 'llm2clip/README.md').read_text()))
    there = {f'{path.name}/' if path.is_dir() else path.name for path in (ROOT / 'llm2clip').iterdir()
             if not path.name.startswith('_') and (path.is_dir() or path.suffix == '.py')}
    assert there <= packages, there - packages
