# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Commands in processes of their own: how long they take, how much memory they need, and what a kill costs them."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import psutil
import torch

from llm2clip.files import write_json

__all__ = ['Measurer', 'Program', 'count', 'kept', 'kill_and_go_on', 'largest_difference', 'number_after',
           'paces', 'watch']

ROUNDS = 3
# Seconds between two looks at what is done, and at the memory, which takes the kernel a few milliseconds to add up.
_LOOKS, _MEMORY_LOOKS = 0.1, 0.5


class Program(NamedTuple):
    """A command that trains."""

    command: Sequence[str]
    done: Callable[[], int]
    """How many steps its log says are done."""
    goes_on_from: Callable[[str], int]
    """What the command said -> the step after which it went on, 0 if it began anew."""
    weights: Callable[[], Mapping[str, torch.Tensor]]
    """What it trained, when it has ended."""


def count(path: Path, text: str) -> int:
    """How often a text is in a file, which need not be there yet."""
    return path.read_text(errors='replace').count(text) if path.is_file() else 0


def number_after(text: str, words: str) -> int:
    """The number that follows some words, 0 if they are not there."""
    match = re.search(re.escape(words) + r'(\d+)', text)
    return int(match[1]) if match else 0


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, from the file where it was kept by an earlier call."""
    if not path.is_file():
        start = time.monotonic()
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        print(f'{path} ({time.monotonic() - start:.0f} s): {json.dumps(found)}', flush=True)
    return json.loads(path.read_text())


class Measurer:
    """Follows the steps and the memory of a command.

    Args:
        done: As of a `Program`.
        memory: Look at the memory, which slows the command down.
    """

    def __init__(self, done: Callable[[], int], memory: bool = True) -> None:
        self._done, self._memory, self._start = done, memory, time.monotonic()
        self._memory_at = 0.0
        self.first: Optional[tuple[float, int]] = None
        """Seconds from the start until a step was done, and how many were."""
        self.last: Optional[tuple[float, int]] = None
        """The same of the step that was the last."""
        self.peak, self.peak_of_training = 0, 0

    def look(self, process: psutil.Process) -> None:
        seconds, done = time.monotonic() - self._start, self._done()
        if done and (self.last is None or done > self.last[1]):
            self.last = seconds, done
            self.first = self.first or self.last
            self.peak_of_training = self.peak
        if self._memory and seconds >= self._memory_at:
            self._memory_at = seconds + _MEMORY_LOOKS
            self.peak = max(self.peak, proportional_memory(process))

    def found(self) -> dict[str, Any]:
        """``seconds`` of the command, ``peak_gib``, and where it has steps ``first_step`` (seconds until it was done),
        ``seconds_per_step``, from the first to the last, and ``peak_gib_of_training``, until the last."""
        result: dict[str, Any] = {'seconds': time.monotonic() - self._start, 'peak_gib': self.peak / 2**30}
        if self.first is not None and self.last is not None:
            steps = self.last[1] - self.first[1]
            result['first_step'] = self.first[0]
            result['seconds_per_step'] = (self.last[0] - self.first[0]) / steps if steps else None
            result['peak_gib_of_training'] = self.peak_of_training / 2**30
        return result


def proportional_memory(process: psutil.Process) -> int:
    """Bytes that a process and all below it have in memory; of what they share with others, their part (PSS)."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().pss
    return total


@contextmanager
def _started(command: Sequence[str], log: Path) -> Iterator[psutil.Popen]:
    """A command with all that it says in a file; when the block ends, it and all below it are killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def watch(
    command: Sequence[str],
    log: Path,
    done: Callable[[], int] = lambda: 0,
    kill_when: Callable[[float], bool] = lambda seconds: False,
    memory: bool = True,
) -> dict[str, Any]:
    """Run a command; what `Measurer` found, or nothing if it was killed.

    Args:
        command: Program and arguments.
        log: File for what it says.
        done: As of a `Program`.
        kill_when: Told the seconds since the start, whether to kill it and all below it, by SIGKILL.
        memory: As of `Measurer`.

    Raises:
        SystemExit: It failed, or should have been killed and ended before.
    """
    measurer = Measurer(done, memory)
    start = time.monotonic()
    with _started(command, log) as process:
        while process.poll() is None:
            measurer.look(process)
            if kill_when(time.monotonic() - start):
                return {}
            time.sleep(_LOOKS)
    if process.returncode:
        sys.exit(f'{log.read_text(errors="replace")[-4000:]}\n{" ".join(command)} failed')
    return measurer.found()


def paces(makers: Mapping[str, Callable[[Path], Program]], folder: Path) -> dict[str, float]:
    """Seconds per step of programs that take turns, medians over the rounds: a machine that others share is faster in
    one hour than in the next.

    Args:
        makers: Name -> folder -> a program that trains a few steps there.
        folder: Where these folders go, which are removed, and the file of each round, which is measured again only if
            it lacks one of the programs.
    """
    rounds = []
    for i in range(ROUNDS):
        if (path := folder / f'round{i}.json').is_file() and makers.keys() - json.loads(path.read_text()).keys():
            path.unlink()
        rounds.append(kept(path, partial(_round, makers, folder / 'run')))
    return {name: statistics.median(each[name] for each in rounds) for name in makers}


def _round(makers: Mapping[str, Callable[[Path], Program]], folder: Path) -> dict[str, float]:
    found = {}
    for name, make in makers.items():
        shutil.rmtree(folder, ignore_errors=True)
        program = make(folder)
        found[name] = watch(
            program.command, folder.with_suffix('.log'), program.done, memory=False)['seconds_per_step']
    shutil.rmtree(folder)
    return found


def largest_difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference of two models' weights, which have the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def kill_and_go_on(make: Callable[[Path], Program], folder: Path, steps: int, kill_after: int) -> dict[str, Any]:
    """Train three times: killed in the middle, and twice without that, which says what a repetition changes.

    Args:
        make: Folder -> a program that trains there, always in the same way, and goes on when it is started again.
        folder: Where these folders go; they are removed.
        steps: How many the program trains.
        kill_after: That many steps, SIGKILL comes.

    Returns:
        ``killed_after`` and ``goes_on_from`` in steps, and the largest difference of a final weight from that of the
        first training, after the kill (``difference``) and without one (``difference_of_a_repetition``).
    """
    shutil.rmtree(folder, ignore_errors=True)
    killed = make(folder / 'killed')
    watch(killed.command, folder / 'killed.log', kill_when=lambda _: killed.done() >= kill_after)
    killed_after, log = killed.done(), folder / 'killed_again.log'
    watch(killed.command, log)
    weights = [killed.weights()]
    for name in ('whole', 'repeated'):
        program = make(folder / name)
        watch(program.command, folder / f'{name}.log')
        weights.append(program.weights())
    result = {'steps': steps, 'killed_after': killed_after,
              'goes_on_from': killed.goes_on_from(log.read_text(errors='replace')),
              'difference': largest_difference(weights[1], weights[0]),
              'difference_of_a_repetition': largest_difference(weights[1], weights[2])}
    shutil.rmtree(folder)
    return result
