# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Execution of the tasks of a step by processes of this machine, or by workers of a Ray cluster."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, Optional, TypeVar, Union

from tqdm import tqdm

from llm2clip.errors import ConfigError, missing_extra

S = TypeVar('S')
T = TypeVar('T')

Work = Callable[[Iterable[S], Callable[[T], object]], None]
"""Function that does tasks, taken one by one, and passes their results on in order."""

_MAX_LOST_WORKERS = 3  # workers that may be lost over the same task
_POLL_SECONDS = 2.0  # seconds between checks for machines that have joined


class LostWorkersError(RuntimeError):
    """The workers of a task were lost again and again."""


class LocalEngine:
    """`num_workers` processes of this machine, each with one task at a time; one is this process itself."""

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = num_workers

    def __str__(self) -> str:
        return '1 process' if self.num_workers == 1 else f'{self.num_workers} processes'

    def run(
        self, tasks: Mapping[str, S], start: Callable[[], Work[S, T]], done: Callable[[T], object]
    ) -> None:
        """Do tasks.  An error of `start` or of the work ends the job, and no further task begins.

        Args:
            tasks: Name for messages -> input of the work.
            start: Makes the work; each worker calls it once, before its first task.
            done: Receives the results, in any order.
        """
        work = start()
        items = list(tasks.values())
        num_workers = min(self.num_workers, len(items))
        if num_workers <= 1:
            work(items, done)
            return
        _forked[:] = work, items
        pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context('fork'))
        try:
            for future in as_completed([pool.submit(_do_forked, i) for i in range(len(items))]):
                done(future.result())
        finally:
            # After an error, running tasks finish, and no others begin.
            pool.shutdown(wait=False, cancel_futures=True)


# Work and tasks, set before the processes fork, so that neither has to be picklable.
_forked: list[Any] = []


def _do_forked(i: int) -> Any:
    work, items = _forked
    results: list[Any] = []
    work([items[i]], results.append)
    return results[0]


class RayEngine:
    """Workers of the Ray cluster of this machine; without a cluster, Ray starts on this machine alone.

    There are as many workers as fit on the machines, including those that join later.  If a worker is lost,
    another one gets its task.  Work, tasks and results are pickled.

    Args:
        cpus: CPUs per worker.
        gpu: Whether each worker has a GPU.  None: if the cluster has any; the attribute `gpu` is the result.

    Raises:
        ConfigError: Ray is not installed, there are several ranks, or no machine has room for a worker.
    """

    def __init__(self, cpus: int = 1, gpu: Optional[bool] = False) -> None:
        _connect_to_ray()
        import ray
        if gpu is None:
            gpu = ray.cluster_resources().get('GPU', 0) > 0
        self.gpu = gpu
        self._share = {'CPU': cpus}
        if gpu:
            self._share['GPU'] = 1
        self._needs = ' and '.join(_number(n, kind) for kind, n in self._share.items())
        if not self._room():
            raise ConfigError(f'no machine of the Ray cluster has room for a worker with {self._needs}; '
                              '`ray status` shows what they have', key='engine')

    def __str__(self) -> str:
        room = self._room()
        workers = _number(sum(room), 'worker')
        return f'{workers} with {self._needs} on {_number(len(room), "machine")} of a Ray cluster'

    def _room(self) -> list[int]:
        """Return how many workers, running ones included, fit on each machine that fits any."""
        import ray
        room: list[int] = []
        for node in ray.nodes():
            if node['Alive']:
                room.append(min(int(node['Resources'].get(kind, 0) // n) for kind, n in self._share.items()))
        return [num_workers for num_workers in room if num_workers]

    def run(
        self, tasks: Mapping[str, S], start: Callable[[], Work[S, T]], done: Callable[[T], object]
    ) -> None:
        """Do tasks as `LocalEngine.run` does."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
        remote: Any = ray.remote  # its type annotations lack some arguments
        actor = remote(num_cpus=self._share['CPU'], num_gpus=self._share.get('GPU', 0),
                       max_restarts=0)(_Worker)
        waiting = deque(tasks)
        workers: list[Any] = []
        idle: list[Any] = []
        calls: dict[Any, tuple[Any, Optional[str]]] = {}  # call -> worker, task (None at the start)
        num_lost = Counter[Optional[str]]()  # task -> workers that were lost
        try:
            while True:
                unfinished = len(waiting) + sum(task is not None for _, task in calls.values())
                if not unfinished:
                    return
                for _ in range(min(sum(self._room()), unfinished) - len(workers)):
                    worker = actor.remote()
                    workers.append(worker)
                    calls[worker.start.options(name='start').remote(start, os.getcwd())] = worker, None
                while waiting and idle:
                    worker = idle.pop()
                    task = waiting.popleft()
                    calls[worker.do.options(name=task).remote(tasks[task])] = worker, task
                if not calls:  # all machines with room for a worker are lost, and others may join
                    time.sleep(_POLL_SECONDS)
                    continue
                for call in ray.wait(list(calls), timeout=_POLL_SECONDS)[0]:
                    worker, task = calls.pop(call)
                    try:
                        result = ray.get(call)
                    except RayTaskError as error:
                        raise error.cause from error
                    except (RayActorError, OutOfMemoryError) as error:
                        ray.kill(worker)  # it may be alive but unreachable
                        workers.remove(worker)
                        num_lost[task] += 1
                        _report_loss(task, num_lost[task], error)
                        if task is not None:
                            waiting.appendleft(task)
                        continue
                    num_lost[None] = 0
                    idle.append(worker)
                    if task is not None:
                        done(result)
        finally:
            for worker in workers:
                ray.kill(worker)


# What executes the tasks of a step.  As a text, it describes the available workers.
Engine = Union[LocalEngine, RayEngine]


def _connect_to_ray() -> None:
    """Connect to the cluster of this machine, or start Ray on it; the signal handlers stay."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ConfigError('ray has workers of its own, expected to be called without ranks, by python or '
                          'composer -n 1', key='engine')
    try:
        import ray
    except ImportError as error:
        raise missing_extra('engine: ray', 'ray', error) from None
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(log_to_driver=False, ignore_reinit_error=True)
    for number, handler in handlers.items():  # Ray has replaced them
        signal.signal(number, handler)


def _report_loss(task: Optional[str], num_lost: int, error: Exception) -> None:
    """Print that a worker was lost over a task (None: before its first one).

    Raises:
        LostWorkersError: So many were lost over it that another one would be, too.
    """
    reason = str(error).strip().splitlines()[-1].split('. ')[0].strip()  # without Ray's guesses
    if num_lost > _MAX_LOST_WORKERS:
        when = 'before their first task' if task is None else f'while they had {task} in hand'
        raise LostWorkersError(f'{num_lost} workers were lost {when}; of the last one Ray says: '
                               f'{reason}') from error
    message = f'a worker was lost ({reason})'
    if task is not None:
        message += f'; {task} will be done again'
    tqdm.write(message, file=sys.stderr)


def _number(n: int, noun: str) -> str:
    return f'{n} {noun}' if n == 1 else f'{n} {noun}s'


class _Worker:
    """Ray actor: a process in the cluster that does one task at a time."""

    def start(self, start: Callable[[], Work[Any, Any]], folder: str) -> None:
        """Make the work in the driver's working directory, so that relative paths mean the same."""
        with _naming_the_machine():
            os.makedirs(folder, exist_ok=True)
            os.chdir(folder)
            self._work = start()

    def do(self, task: Any) -> Any:
        results: list[Any] = []
        with _naming_the_machine():
            self._work([task], results.append)
        return results[0]


@contextmanager
def _naming_the_machine() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f'on the machine {socket.gethostname()}')
        raise
