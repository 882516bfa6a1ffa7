# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Faults at single calls of a recipe to the system: the run is killed there, or the call fails."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from launched import Launched

SOURCE = Path(__file__).with_name('faults.c')


class Call(NamedTuple):
    """A call that changes files: the position among all calls of the run, its name, and the path."""

    number: int
    name: str
    path: Path


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
            number, name, path = line.split(' ', 2)
            calls.append(Call(int(number), name, Path(path)))
        return sorted(calls)
