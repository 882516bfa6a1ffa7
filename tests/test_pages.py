# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Pages: commands load, links lead somewhere, named files exist, tables equal their records, and all builds."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from recipes_in_process import ROOT, SCHEMAS
from setuptools import build_meta
from sphinx.cmd.build import build_main
from trained import trained

from llm2clip.config import PipelineConfig
from llm2clip.config.loading import load_config
from llm2clip.export.hf import export_folder
from llm2clip.pipeline import load_steps
from recipes.benchmarks.measuring import describe

TABLES, SITE = (runpy.run_path(str(ROOT / f'docs/{name}.py')) for name in ('tables', 'conf'))
READMES = [ROOT / f'{folder}/README.md' for folder in ('recipes', 'yamls', 'llm2clip')]
PAGES = [str(page.relative_to(ROOT)) for page in [*TABLES['pages'](), *READMES, *(ROOT / '.github').rglob('*.md')]]


def _missing(text: str, folder: Path) -> set[str]:
    """Files of the repository that a text names, by their path or, in backticks, a part of it, and that are absent."""
    names = re.findall(r'(?<![\w./-])((?:recipes|yamls|llm2clip|tests|docs|results)/(?:[\w.-]+/)*'
                       r'(?:[\w.-]+\.(?:py|yaml|md|json|sbatch))?)(?![\w/])', text)
    names += [name for name in re.findall(r'`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|sbatch))`', text) if name[:5] != 'runs/']
    bases = ROOT, folder, ROOT / 'llm2clip', ROOT / 'yamls', ROOT / 'recipes'
    allowed = {'recipes/X.py', *re.findall(r'<!-- (results/[\w.]+)', text)}  # a record may be measured later
    return {name for name in names if not any((base / name).exists() for base in bases)} - allowed


def _anchors(page: Path) -> set[str]:
    text = page.read_text()
    headings = re.findall(r'^#+ (.*)', text, re.M)
    anchors = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
    return anchors.union(re.findall(r'<a id="(.+?)"', text))  # of keys


@pytest.mark.parametrize('page', PAGES)
def test_commands_load(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = ''.join(re.findall(r'```bash\n(.*?)```', Path(page).read_text(), re.S))
    blocks = blocks.replace('\\\n', ' ').replace(')\n', '\n')  # $(…) ends after the last argument
    targets = re.findall(r'^([\w-]+):', Path('Makefile').read_text(), re.M)
    for words in (shlex.split(line, comments=True) for line in blocks.splitlines()):
        recipe = next((i for i, word in enumerate(words) if word.startswith('recipes/')), None)
        if words[:1] == ['make']:
            assert all(word in targets or '=' in word for word in words[1:]), words
        elif recipe is not None and '--help' not in words:  # a YAML file without a folder is the reader's own
            args = [word for word in words[recipe + 1:] if not re.fullmatch(r'\w+\.yaml', word)]
            load_config(SCHEMAS[Path(words[recipe]).stem], args)


@pytest.mark.parametrize(('page', 'files'), [
    ('docs/getting-started/quickstart.md', ['quickstart']),
    ('docs/guides/reproduce.md', ['paper_cc3m', 'paper'])])
def test_a_page_shows_the_steps_of_its_pipeline(page: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = ''.join(re.findall(r'```bash\n(.*?)```', Path(page).read_text(), re.S)).replace('\\\n', ' ')
    shown = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    for step in load_steps(load_config(PipelineConfig, [f'yamls/pipelines/{file}.yaml' for file in files])):
        assert shlex.split(str(step)) in shown


@pytest.mark.parametrize('page', PAGES)
def test_links_files_and_tables(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```', '', text, flags=re.S)):
        path, _, anchor = link.partition('#')
        if '://' not in link:
            target = folder / path if path else ROOT / page
            assert target.exists() and (not anchor or anchor in _anchors(target)), link
    assert not (missing := _missing(text, folder)), missing
    assert TABLES['rewritten'](text) == text, 'a table differs from its record: run make docs'


def test_lines_of_code_fit_the_page() -> None:
    generated = [str(page.relative_to(ROOT)) for page in (ROOT / 'docs/reference/generated').glob('*.md')]
    wide: list[str] = []
    for page in [*PAGES, *generated]:
        for block in re.findall(r'^```(.*?)^```', (ROOT / page).read_text(), re.S | re.M):
            wide += [f'{page}: {line}' for line in block.splitlines() if len(line) > 92]
    assert not wide, '\n'.join(wide)


def test_the_pages_are_at_most_20000_words() -> None:
    """Code and tables that are made from records do not count."""
    words: list[str] = []
    for page in (ROOT / 'docs').rglob('*.md'):
        if page.parent.name != 'generated':
            text = re.sub(r'```.*?```|<!-- \S+\.json.*?<!-- end -->|<!--.*?-->', '', page.read_text(), flags=re.S)
            words += re.findall(r"[A-Za-z0-9][\w'’.,/-]*", re.sub(r'\]\([^)]*\)', ']', text))
    assert len(words) <= 20_000


def test_the_index_lists_every_page_by_its_title() -> None:
    text = (ROOT / 'docs/index.md').read_text().partition('## All pages')[2]
    titles = {page: title for title, page in re.findall(r'\[(.+?)\]\((.+?)\)', text)}
    listed = [*titles]
    generated = {f'reference/generated/{recipe}.md' for recipe in SCHEMAS}
    pages = {str(page.relative_to(ROOT / 'docs')) for page in (ROOT / 'docs').rglob('*.md')} - generated
    assert sorted(listed) == sorted({*pages, 'tutorials/photographs.ipynb'} - {'index.md', '404.md'})
    for page in pages & titles.keys():
        assert f'# {titles[page]}\n' in (ROOT / 'docs' / page).read_text(), page


def test_heads_of_yaml_files_name_files() -> None:
    for path in ROOT.glob('yamls/**/*.yaml'):
        head = re.match('(#.*\n)*', path.read_text())
        assert head is not None and not (missing := _missing(head[0], path.parent)), f'{path}: {missing}'


@pytest.mark.parametrize('file', sorted((ROOT / 'results').glob('*.json')), ids=lambda file: file.stem)
def test_records_say_how_they_were_measured(file: Path) -> None:
    record = json.loads(file.read_text())
    about, runs = record['about'], record['runs']
    assert {*about} - {'what', 'settings', 'note', 'fixed', 'runs'} == {*describe()}
    assert about['seeds'] == sorted({int(seed) for run in runs.values() for seed in run if seed.isdigit()})
    assert about.get('runs', {}).keys() <= runs.keys()
    for differing in about.get('runs', {}).values():
        assert differing.keys() <= {*about, 'published'}
    for facts in (about, *about.get('runs', {}).values()):
        assert re.fullmatch(r'[0-9a-f]{7}', facts.get('commit') or '0000000')
        assert re.fullmatch(r'\d{4}-\d\d-\d\d', facts.get('date', about['date']))


def test_the_line_below_a_table_says_where_rows_differ() -> None:
    about = {'commit': 'aaaaaaa', 'date': '2026-11-20', 'torch': '2.15.0', 'hardware': 'two cores',
             'fixed': 'one teacher', 'runs': {'b': {'commit': None}, 'c': {'published': 'a paper'}}}
    rows = {'first': 'a', 'other': 'b', 'third': 'd', 'a paper': 'c'}
    runs = {'a': {'0': {'x': 1}, '1': {'x': 2}, '2': {'x': 3}}, 'b': {'0': {'x': 1}}, 'c': {'-': {'x': 4}}}
    runs['d'] = runs['a']
    record = {'about': about, 'runs': runs, 'tables': {'t': {'of': '', 'columns': {'x': ['x']}, 'rows': rows}}}
    line = 'Commit aaaaaaa, 2026-11-20, torch 2.15.0, two cores, seeds 0, 1 and 2, one teacher'
    assert TABLES['origin'](record, 't').splitlines() == [
        f'<details><summary><small>{line}; some rows differ.</small></summary>', '',
        '- other: commit not recorded, seed 0', '', '</details>']
    del rows['other']
    assert TABLES['origin'](record, 't') == f'<small>{line}.</small>'


def test_packages_are_described() -> None:
    packages = set(re.findall(r'`([\w.]+/?)`', (ROOT / 'docs/development/architecture.md').read_text()))
    there = {f'{path.name}/' if path.is_dir() else path.name for path in (ROOT / 'llm2clip').iterdir()
             if not path.name.startswith('_') and (path.is_dir() or path.suffix == '.py')}
    assert there <= packages, there - packages


def test_the_site_builds(tmp_path: Path) -> None:
    pages = {f'{recipe}.md': SITE['recipe_page'](ROOT / f'recipes/{recipe}.py') for recipe in SCHEMAS}
    for name, text in {**pages, 'yamls.md': SITE['yaml_page']()}.items():
        assert (ROOT / 'docs/reference/generated' / name).read_text() == text, f'{name} is old: run make docs'
    assert build_main(['-q', '-W', '--keep-going', '-b', 'dummy', str(ROOT / 'docs'), str(tmp_path)]) == 0


TRANSPARENT_IS_WHITE = """
Image.new('RGBA', (64, 64)).save('transparent.png')
Image.new('RGB', (64, 64), 'white').save('white.png')
torch.allclose(*embed_images(['transparent.png', 'white.png']), atol=1e-5)
"""


def test_the_notebook_runs(teacher_folder: Path, image_dataset: Path, tmp_path: Path) -> None:
    model = trained('timm:test_efficientnet', [teacher_folder], image_size=32, seed=3, embed_dim=16)
    export_folder(*model, tmp_path / 'runs/quickstart/export/llm2clip')
    shutil.copytree(image_dataset, tmp_path / 'runs/quickstart/data/emoji/unseen_style')
    notebook = nbformat.read(ROOT / 'docs/tutorials/photographs.ipynb', 4)
    notebook.cells.append(nbformat.v4.new_code_cell(TRANSPARENT_IS_WHITE))
    NotebookClient(notebook, resources={'metadata': {'path': tmp_path}}).execute()
    results = [o.data for cell in notebook.cells for o in cell.get('outputs', []) if o.output_type == 'execute_result']
    assert [data['text/plain'] for data in results[:2]] == ['64', 'torch.Size([64, 16])']
    assert sum('image/png' in data for data in results) == 3
    assert results[-1]['text/plain'] == 'True'


def test_distributions_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'runs', 'build', 'official')
    shutil.copytree(ROOT, tmp_path / 'source', ignore=skipped)
    monkeypatch.chdir(tmp_path / 'source')
    with tarfile.open(tmp_path / build_meta.build_sdist(str(tmp_path))) as sdist:
        files = {name.partition('/')[2] for name in sdist.getnames()}
    folders = 'llm2clip', 'recipes', 'yamls', 'docs', 'results', 'tests'
    assert {str(path) for folder in folders for path in Path(folder).rglob('*.*')} <= files
    with zipfile.ZipFile(tmp_path / build_meta.build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(tmp_path / 'wheel')
        assert {str(path) for path in Path('llm2clip').rglob('*.*')} <= {*wheel.namelist()}
    subprocess.run([sys.executable, '-ISc', 'import sys; sys.path += ["../wheel"]; import llm2clip'], check=True)
