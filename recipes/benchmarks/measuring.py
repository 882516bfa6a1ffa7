# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tools for benchmarks, ablations and baselines: monitored processes, records of results, and tables."""

import datetime
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any, Optional

import psutil
import torch

from llm2clip.command import source_commit
from llm2clip.io.files import write_json

BENCH_FOLDER = Path('runs/bench')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Seconds between polls of a process, and at least of its memory.
_LOOKS, _MEMORY_LOOKS = 0.1, 0.5
_PACKAGES = ('timm', 'peft', 'mosaicml', 'mosaicml-streaming', 'open_clip_torch', 'sentence-transformers')


class ProcessFailedError(RuntimeError):
    """A command failed or took too long.  After a failure, the message includes the end of its log."""


def watch(
    command: Sequence[str], log: Path, done: Callable[[], int] = lambda: 0, memory: bool = False,
    limit: float = float('inf'), cwd: Optional[Path] = None, environment: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Run a command to its end.  Its process group has ended when this function returns or raises.

    Args:
        command: Program and arguments.
        log: File for its output.
        done: Returns the number of finished training steps.
        memory: Measure the memory, which slows the command down a little.
        limit: Seconds after which it is killed.  A ProcessFailedError reports this,
            or a non-zero exit status.
        cwd: Working directory.
        environment: Variables added to those of this process.

    Returns:
        ``seconds``.  With `memory`, ``peak_gib``: PSS of all its processes, measured until the last step if
        there are steps.  With two steps or more, ``first_step``, the seconds to its end, and
        ``seconds_per_step``, from there to the end of the last.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[float, int]] = []
    finished = peak = peak_of_steps = 0
    memory_at = 0.0
    start = time.monotonic()
    with log.open('w') as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                               cwd=cwd, env=dict(os.environ) | dict(environment))
    try:
        while process.poll() is None:
            seconds = time.monotonic() - start
            n = done()
            if seconds > limit:
                raise ProcessFailedError(f'took longer than {limit:g} s')
            if n > finished:
                finished = n
                steps.append((seconds, n))
                peak_of_steps = peak
            if memory and seconds >= memory_at:
                peak = max(peak, _proportional_memory(process))
                # The kernel takes 0.2 s to add up 5 GiB: this may cost 2 % of a core.
                took = time.monotonic() - start - seconds
                memory_at = seconds + max(_MEMORY_LOOKS, 50 * took)
            time.sleep(_LOOKS)
    finally:
        _kill(process)
    if process.returncode:
        raise ProcessFailedError(f'{log.read_text(errors="replace")[-4000:]}\n{" ".join(command)} failed '
                                 f'with the status {process.returncode}')
    measured: dict[str, Any] = {'seconds': time.monotonic() - start}
    if memory:
        measured['peak_gib'] = (peak_of_steps or peak) / 2**30
    if len(steps) > 1:
        first, num_first = steps[0]
        last, num_last = steps[-1]
        measured.update(first_step=first, seconds_per_step=(last - first) / (num_last - num_first))
    return measured


def paces_in_turns(
    trainings: Mapping[str, tuple[Sequence[str], Callable[[], int]]], logs: Path, warm_up: int, rounds: int,
    seconds: float,
) -> dict[str, dict[str, float]]:
    """Return the paces of trainings that run in turns: a slow minute of the machine affects all alike.

    All are started and stay in memory; signals stop those that wait.  They are killed at the end.

    Args:
        trainings: Name -> command, and a function that returns the number of finished steps.
        logs: Folder for their outputs.
        warm_up: Steps after the start that do not count.
        rounds: Turns of each training.
        seconds: Length of a turn, which ends with a step.

    Returns:
        Name -> ``first_step``, the seconds from the start to the end of the first step, and
        ``seconds_per_step``.  A ProcessFailedError reports a training that ended.
    """
    processes: dict[str, psutil.Popen] = {}
    paces: dict[str, dict[str, float]] = {}
    running = dict.fromkeys(trainings, 0.0)
    steps = dict.fromkeys(trainings, 0)

    def next_step(name: str) -> int:
        """Wait for a training to finish a step; return the number of its steps."""
        finished = trainings[name][1]
        before = finished()
        while (now := finished()) == before:
            if processes[name].poll() is not None:
                raise ProcessFailedError(f'{logs / name}.log: the training ended')
            time.sleep(_LOOKS)
        return now

    logs.mkdir(parents=True, exist_ok=True)
    try:
        for name, (command, _) in trainings.items():
            start = time.monotonic()
            with Path(f'{logs / name}.log').open('w') as file:
                processes[name] = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                               start_new_session=True)
            next_step(name)
            paces[name] = {'first_step': time.monotonic() - start}
            while next_step(name) < warm_up:
                pass
            os.killpg(processes[name].pid, signal.SIGSTOP)
        for _ in range(rounds):
            for name in trainings:
                os.killpg(processes[name].pid, signal.SIGCONT)
                first = last = next_step(name)
                start = now = time.monotonic()
                while now < start + seconds:
                    last = next_step(name)
                    now = time.monotonic()
                os.killpg(processes[name].pid, signal.SIGSTOP)
                running[name] += now - start
                steps[name] += last - first
    finally:
        for process in processes.values():
            _kill(process)
    for name, pace in paces.items():
        pace['seconds_per_step'] = running[name] / steps[name]
    return paces


def _kill(process: psutil.Popen) -> None:
    """Kill the process group of a process that was started as its leader."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def occurrences(file: Path, text: str) -> int:
    """Return how often a text is in a file; 0 without the file."""
    return file.read_text(errors='replace').count(text) if file.is_file() else 0


def _proportional_memory(process: psutil.Process) -> int:
    """Return the memory of a process and its descendants in bytes, with their share of shared pages (PSS)."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += member.memory_full_info().pss
    return total


def run_alone(module: str, *arguments: object) -> Any:
    """Run a module in a separate process and return the JSON in its last line of output.

    Its allocator returns freed tensors to the system at once, since fragmentation would raise its peak
    memory.
    """
    done = subprocess.run([sys.executable, '-m', module, *map(str, arguments)], check=True,
                          stdout=subprocess.PIPE, text=True,
                          env=os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536'})
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb(step: Callable[[], object]) -> float:
    """Return the peak memory of a step in MiB, beyond the allocated or resident memory before it."""
    if DEVICE == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins again, since loading a model has one
    before = _peak_kib()
    step()
    return (_peak_kib() - before) / 2**10


def _peak_kib() -> int:
    """Return the peak resident memory of this process; that of `getrusage` includes its parent's."""
    peak, = re.findall(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())
    return int(peak)


def seconds_in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way; they take turns in alternating order, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + rounds):
        for name in sorted(ways, reverse=turn % 2 == 0):
            start = time.perf_counter()
            ways[name]()
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def hardware() -> str:
    """Return the GPU's name, or the number of usable CPU cores and the processor's name."""
    if DEVICE == 'cuda':
        return torch.cuda.get_device_name()
    names = re.findall(r'^model name\s*: (.*)', Path('/proc/cpuinfo').read_text(), re.M)
    cores = len(os.sched_getaffinity(0))
    return f'{cores} CPU cores, {next(iter(names), platform.machine())}'


def describe() -> dict[str, Any]:
    """Return what the records in `results/` say in `about`, for a measurement with this command now."""
    packages = {'python': platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        'command': ' '.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        'date': datetime.date.today().isoformat(), 'commit': source_commit(), 'torch': torch.__version__,
        'transformers': version('transformers'), 'packages': packages, 'hardware': hardware(), 'seeds': []}


class Record:
    """Results by run and seed in a JSON file, read if it exists and written after every addition.

    The file has the keys `about` and `runs` of the records in `results/`.  What differs for a run from the
    first one, because the command was repeated later, stands in ``about["runs"]``.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._writing, self._now = file, Lock(), describe()
        content = json.loads(file.read_text()) if file.is_file() else {}
        self.about: dict[str, Any] = content.get('about', dict(self._now))
        self.results: dict[str, dict[str, Any]] = content.get('runs', {})

    def has(self, name: str, seed: int) -> bool:
        return str(seed) in self.results.get(name, {})

    def add(self, name: str, seed: int, result: Any) -> None:
        with self._writing:
            # The seeds of a run may be of several commits or days.
            earlier = self.about.get('runs', {}).get(name, {})
            differing = {}
            for key in ('date', 'commit', 'torch', 'transformers', 'hardware'):
                value = self._now[key]
                if name in self.results:
                    before = str(earlier.get(key, self.about[key]))
                    value = before if str(value) in before else f'{before} and {value}'
                if value != self.about[key]:
                    differing[key] = value
            if differing:
                self.about.setdefault('runs', {})[name] = differing
            self.results.setdefault(name, {})[str(seed)] = result
            self.about['seeds'] = sorted({*self.about['seeds'], seed})
            write_json(self.file, {'about': self.about, 'runs': self.results})

    def by_seed(self, name: str) -> list[Any]:
        """Return the results of a variant, ordered by seed."""
        return [result for _, result in sorted(self.results.get(name, {}).items())]


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """Return the result of `measure`, cached as JSON in a file."""
    if not path.is_file():
        start = time.monotonic()
        result = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        print(f'{path} ({time.monotonic() - start:.0f} s): {json.dumps(result)}', flush=True)
    return json.loads(path.read_text())


def write_result(
    name: str, subject: str, against: str, ratio: float, numbers: Mapping[str, Any],
    at_most: float, correct: bool = True,
) -> None:
    """Write `runs/bench/<name>.json`: how it was measured, the ratio of `subject` to `against`, its bound,
    and the raw numbers.  ``meets`` is true if the ratio is `at_most` that and `correct` is true."""
    print(f'{name}: {ratio:.3f}, bound {at_most:.2f} ({subject} / {against})', flush=True)
    BENCH_FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(BENCH_FOLDER / f'{name}.json', {
        'name': name, 'what': subject, 'against': against, 'ratio': ratio, 'bound': at_most,
        'meets': correct and ratio <= at_most, 'medians': dict(numbers), 'about': describe()})


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with a trailing newline."""
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|', *(f'| {" | ".join(row)} |' for row in rows)]
    return '\n'.join(lines) + '\n'
