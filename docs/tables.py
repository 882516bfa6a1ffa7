# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Rewrite the tables of README.md and docs/ from the records in results/: python docs/tables.py [--check]

A table stands between ``<!-- results/NAME.json -->``, or ``<!-- results/NAME.json#TABLE -->``, and ``<!-- end
-->``.  A record is ``{"about": …, "tables": {name: table}, "runs": {run: {seed: numbers}}}``.  In a table,
`of` is the first column's title, `columns` maps titles to paths of numbers, and `rows` maps labels to runs.
A cell averages its paths.  It shows the mean ± standard deviation of three or more seeds,
or else each seed's number.  `digits` is optional (1).

Below a table stands how it was measured: `commit`, `date`, `torch`, `hardware`, the seeds of its runs, and
what was `fixed` for all seeds.  ``about["runs"]`` has what differs for single runs.  A run with `published`
was not measured here.
"""

import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r'^(<!-- (results/[\w.-]+\.json)(?:#(\w+))? -->\n)(.*?)(?=^<!-- end -->)', re.M | re.S)


def pages() -> list[Path]:
    """Return README.md and the hand-written pages of docs/."""
    generated = ROOT / 'docs/reference/generated'
    written = [page for page in sorted((ROOT / 'docs').rglob('*.md')) if page.parent != generated]
    return [ROOT / 'README.md', *written]


def number(numbers: Any, path: str) -> Optional[float]:
    """Return one seed's number at ``set/metric``, or None; `models` levels must hold one model and are
    skipped."""
    for key in path.split('/'):
        if 'models' in numbers:
            numbers, = numbers['models'].values()
        if key not in numbers:
            return None
        numbers = numbers[key]
    return numbers


def cell(seeds: dict[str, Any], paths: list[str], digits: int) -> str:
    """Format the numbers averaged over `paths`; the cell is empty if no seed has all of them."""
    means: list[float] = []
    for numbers in seeds.values():
        values = [number(numbers, path) for path in paths]
        if None not in values:
            means.append(statistics.mean(values))
    separator = ' / '
    if len(means) >= 3:
        means = [statistics.mean(means), statistics.stdev(means)]
        separator = ' ± '
    return separator.join(f'{mean:,.{digits}f}' for mean in means)


def table(record: dict[str, Any], name: Optional[str]) -> str:
    """Return a record's table as Markdown: the one called `name`, or the first."""
    spec = record['tables'][name] if name else [*record['tables'].values()].pop(0)
    columns = spec['columns']
    rows = [[spec['of'], *columns], ['---', *['---:'] * len(columns)]]
    for label, run in spec['rows'].items():
        rows.append([label])
        for paths in columns.values():
            rows[-1].append(cell(record['runs'][run], paths, spec.get('digits', 1)))
    for title, *cells in zip(*rows):
        assert any(cells[1:]), f'no run has the numbers of the column {title}'
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def seeds_of(run: dict[str, Any]) -> str:
    """Return `seeds 0, 1 and 2`; empty for a run whose only key is no number."""
    seeds = [seed for seed in run if seed.isdigit()]
    if len(seeds) > 1:
        return f'seeds {", ".join(seeds[:-1])} and {seeds[-1]}'
    return ''.join(f'seed {seed}' for seed in seeds)


def origin(record: dict[str, Any], name: Optional[str]) -> str:
    """Return one small line on how most rows of a table were measured, which unfolds to the rows that
    differ."""
    spec = record['tables'][name] if name else [*record['tables'].values()].pop(0)
    facts: dict[str, tuple[str, ...]] = {}
    for label, run in spec['rows'].items():
        about = record['about'] | record['about'].get('runs', {}).get(run, {})
        if 'published' not in about:
            commit = about['commit'] or 'not recorded'
            seeds = seeds_of(record['runs'][run])
            facts[label] = (f'commit {commit}', about['date'], f'torch {about["torch"]}', about['hardware'],
                            seeds, about.get('fixed') or '')
    most = Counter(facts.values()).most_common(1)[0][0]
    line = ', '.join(fact for fact in most if fact)
    line = f'{line[0].upper()}{line[1:]}'
    rows = []
    for label, values in facts.items():
        if values != most:
            differing = [value for value, common in zip(values, most) if value not in ('', common)]
            rows.append(f'- {label}: {", ".join(differing)}')
    if not rows:
        return f'<small>{line}.</small>'
    return '\n'.join([f'<details><summary><small>{line}; some rows differ.</small></summary>', '', *rows, '',
                      '</details>'])


def rewritten(text: str) -> str:
    """Return a page's text with its tables rebuilt from the records; a table without a record is kept."""
    def replace(match: re.Match[str]) -> str:
        marker, file, name, old = match.groups()
        if not (ROOT / file).is_file():
            print(f'{file} is missing; its table was left alone', file=sys.stderr)
            return marker + old
        record = json.loads((ROOT / file).read_text())
        return f'{marker}{table(record, name)}\n\n{origin(record, name)}\n'

    markers = text.count('\n<!-- results/')
    ends = text.count('\n<!-- end -->')
    assert markers == ends == len(MARKED.findall(text)), 'a marker has no end'
    return MARKED.sub(replace, text)


if __name__ == '__main__':
    for page in pages():
        old = page.read_text()
        new = rewritten(old)
        if new != old:
            if '--check' in sys.argv:
                sys.exit(f'{page.relative_to(ROOT)} differs from results/: run make docs')
            page.write_text(new)
