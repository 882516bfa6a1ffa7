# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Rewrite the tables of README.md and docs/ from the records in results/: python docs/tables.py [--check]

A table stands between ``<!-- results/NAME.json -->``, or ``<!-- results/NAME.json#TABLE -->``, and ``<!-- end -->``.
A record is ``{"about": …, "tables": {name: table}, "runs": {run: {seed: numbers}}}``.  A table has `of`, the title of
its first column; `columns`, title -> paths of numbers, whose mean is shown; and `rows`, label -> run.  A cell shows the
mean ± the standard deviation of three seeds or more, or else the number of each seed.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r'^(<!-- (results/[\w.-]+\.json)(?:#(\w+))? -->\n)(.*?)(?=^<!-- end -->)', re.M | re.S)


def pages() -> list[Path]:
    """README.md and the pages of docs/ that are written by hand."""
    generated = ROOT / 'docs/reference/generated'
    return [ROOT / 'README.md', *(page for page in sorted((ROOT / 'docs').rglob('*.md')) if generated != page.parent)]


def number(numbers: Any, path: str) -> Optional[float]:
    """The number at ``set/metric`` of one seed; of an evaluation's result, that of its only model."""
    for key in path.split('/'):
        if 'models' in numbers:
            numbers, = numbers['models'].values()
        if key not in numbers:
            return None
        numbers = numbers[key]
    return numbers


def cell(seeds: dict[str, Any], paths: list[str], digits: int) -> str:
    """The mean over `paths` of every seed; empty where none has these numbers."""
    found = [[number(numbers, path) for path in paths] for numbers in seeds.values()]
    means = [statistics.mean(values) for values in found if None not in values]
    if len(means) >= 3:
        means, join = [statistics.mean(means), statistics.stdev(means)], ' ± '
    else:
        join = ' / '
    return join.join(f'{mean:,.{digits}f}' for mean in means)


def table(record: dict[str, Any], name: Optional[str]) -> str:
    """Markdown of a record's only table, or of the one with this name."""
    spec = record['tables'][name] if name else [*record['tables'].values()].pop(0)
    titles, digits = spec['columns'], spec.get('digits', 1)
    rows = [[label, *(cell(record['runs'][run], paths, digits) for paths in titles.values())]
            for label, run in spec['rows'].items()]
    for title, cells in zip(titles, [*zip(*rows)][1:]):
        assert any(cells), f'no run has the numbers of the column {title}'
    return '\n'.join(f'| {" | ".join(row)} |' for row in [[spec['of'], *titles], ['---'] * (len(titles) + 1), *rows])


def rewritten(text: str) -> str:
    """A page's text with its tables as the records have them; a table without a record stays."""
    def replace(match: re.Match[str]) -> str:
        marker, file, name, old = match.groups()
        if not (ROOT / file).is_file():
            print(f'{file} is missing; its table was left alone', file=sys.stderr)
            return marker + old
        return f'{marker}\n{table(json.loads((ROOT / file).read_text()), name)}\n\n'

    markers, ends = text.count('\n<!-- results/'), text.count('\n<!-- end -->')
    assert markers == ends == len(MARKED.findall(text)), 'a marker has no end'
    return MARKED.sub(replace, text)


if __name__ == '__main__':
    for page in pages():
        if (new := rewritten(old := page.read_text())) != old:
            if '--check' in sys.argv:
                sys.exit(f'{page.relative_to(ROOT)} differs from results/: run make docs')
            page.write_text(new)
