# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Faults at single calls of a recipe to the system: the run is killed there, or the call fails.

As a program, it writes results/faults.json from the counts of `test_faults.py`.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from launched import ROOT, Launched

from recipes.benchmarks.measuring import describe

ROWS = ROOT / 'runs/faults'
"""Counts of each case and kind of fault."""
COLUMNS = ['kills', 'torn writes', 'errors', 'wrong results', 'refusals', 'tracebacks', 'hangs', 'leftovers']
SOURCE = Path(__file__).with_name('faults.c')


class Call(NamedTuple):
    """A call that changes files: the position among all calls of the run, its name, and the path.

    `old` is the path before a rename, or of what a link leads to.  Only a call on an open file has its `inode`.
    """

    number: int
    name: str
    path: Path
    old: str
    inode: int


class Fault(NamedTuple):
    """What goes wrong at a call: ``kill``, ``torn``, or the number of an error."""

    number: int
    kind: str


def build(folder: Path) -> Path:
    """Compile the library that counts calls and makes them fail."""
    library = folder / 'faults.so'
    subprocess.run(['cc', '-O1', '-shared', '-fPIC', '-o', str(library), str(SOURCE), '-ldl'], check=True)
    return library


class WatchedRun:
    """A recipe whose calls below a folder are listed, with a fault at one of them if given."""

    def __init__(self, command: Sequence[str], folder: Path, work: Path, ranks: int = 1,
                 fault: Optional[Fault] = None, env: Optional[dict[str, str]] = None) -> None:
        self.calls_file = work / 'calls'
        self.log = work / 'log'
        count = work / 'count'
        count.write_bytes(bytes(16))
        for path in (self.calls_file, self.log):
            path.unlink(missing_ok=True)
        watched = {'FAULTS_FOLDER': str(folder), 'FAULTS_LOG': str(self.calls_file), 'FAULTS_COUNT': str(count)}
        if fault is not None:
            watched |= {'FAULTS_AT': str(fault.number), 'FAULTS_KIND': fault.kind}
        self.process = Launched(command, self.log, ranks, {**(env or {}), **watched})

    def wait(self, seconds: float) -> int:
        """Return the exit status; a run that takes longer is killed, and raises a TimeoutExpired."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def calls(self) -> list[Call]:
        """Return the calls so far, in order."""
        calls = []
        for line in self.calls_file.read_text().splitlines():
            number, name, path, old, inode = line.split('\t')
            calls.append(Call(int(number), name, Path(path), old, int(inode)))
        return sorted(calls)


def write_record(path: Path) -> None:
    """Write the table of all cases: the number of faults of each kind, and of what went wrong."""
    runs: dict[str, dict[str, dict[str, int]]] = {}
    for file in sorted(ROWS.glob('*.json')):
        row = json.loads(file.read_text())
        counts = runs.setdefault(row['case'], {'0': dict.fromkeys(COLUMNS, 0)})['0']
        faults = {'kill': 'kills', 'torn': 'torn writes'}.get(row['kind'], 'errors')
        counts[faults] += row['positions']
        for column in COLUMNS[3:]:
            counts[column] += row.get(column, 0)
    totals = {column: sum(run['0'][column] for run in runs.values()) for column in COLUMNS}
    about = describe() | {
        'what': 'Faults at single calls that change files, each followed by the same command without a fault',
        'command': 'make test-faults', 'seeds': [0]}
    table = {'of': 'recipe', 'digits': 0, 'columns': {column: [column] for column in COLUMNS},
             'rows': {name: name for name in [*runs, 'all']}}
    record = {'about': about, 'tables': {'faults': table}, 'runs': {**runs, 'all': {'0': totals}}}
    path.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    write_record(Path(sys.argv[1]))
