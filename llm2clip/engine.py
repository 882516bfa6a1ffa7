# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Where the tasks of a step are done: by processes of this machine, or by workers all over a Ray cluster."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar

from tqdm import tqdm

from llm2clip.config import ConfigError

__all__ = ['Engine', 'LocalEngine', 'LostWorkersError', 'RayEngine', 'Work']

S = TypeVar('S')
T = TypeVar('T')

Work = Callable[[Iterable[S], Callable[[T], object]], None]
"""Does tasks.  It takes them one by one, maybe the next while it does the last, and tells their results in order."""

# Workers that may be lost, one after the other, over the same task.
_LOSSES = 3
# Seconds after which the driver looks for machines that have joined.
_LOOK = 2.0
# Tasks that a Ray worker is given at once, so that it never waits for the driver.
_IN_HAND = 2


class LostWorkersError(RuntimeError):
    """The processes or machines that should do a task were lost, again and again."""


class Engine(ABC):
    """Does the tasks of a step.  As a text, it says which workers are at hand."""

    @abstractmethod
    def run(
        self, tasks: Mapping[str, S], start: Callable[[], Work[S, T]], done: Callable[[T], object]
    ) -> None:
        """Do tasks.

        Args:
            tasks: Name, for people -> what the work is given.
            start: Makes the work; a worker calls it once, before its first task.
            done: Is told the result of each task as they come, in any order.

        Raises:
            Exception: What `start` or the work raised.  No further task is begun then.
        """


class LocalEngine(Engine):
    """Processes of this machine, each of which does one task after the other.

    Args:
        num_workers: How many; one is this process itself.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = num_workers

    def __str__(self) -> str:
        return '1 process' if self.num_workers == 1 else f'{self.num_workers} processes'

    def run(
        self, tasks: Mapping[str, S], start: Callable[[], Work[S, T]], done: Callable[[T], object]
    ) -> None:
        work, items = start(), list(tasks.values())
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
            # After an error the tasks that are being done are finished, the others are not begun.
            pool.shutdown(wait=False, cancel_futures=True)


# Work and tasks, set before the processes fork, so that neither need be picklable.
_forked: list[Any] = []


def _do_forked(i: int) -> Any:
    work, items = _forked
    results: list[Any] = []
    work([items[i]], results.append)
    return results[0]


# ---------------------------------------------------------------------------------------------------------------------
# Ray
# ---------------------------------------------------------------------------------------------------------------------


class RayEngine(Engine):
    """Workers of the Ray cluster that this machine belongs to; without one, Ray is started on this machine alone.

    Each worker is an actor, and each task a call of it by the task's name.  There are as many workers as the machines
    have room for, those that join later included.  The tasks of a worker that is lost, with its machine or alone, are
    given to others.  Work, tasks and results are pickled.

    Args:
        cpus: CPUs of a worker.
        gpu: Whether a worker has a GPU of its own.  None: if there are any.

    Attributes:
        gpu: Whether it has.

    Raises:
        ConfigError: Ray is not installed, this process is one of several ranks, or no machine has room for a worker.
    """

    def __init__(self, cpus: int = 1, gpu: Optional[bool] = False) -> None:
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise ConfigError('engine: ray has workers of its own, expected to be called without ranks, by python or '
                              'composer -n 1')
        try:
            import ray
        except ImportError:
            raise ConfigError('engine: ray needs the package ray: pip install "llm2clip[ray]"') from None
        if not ray.is_initialized():
            os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            ray.init(log_to_driver=False)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # Ray has put its own in their place
                    signal.signal(number, handler)
        machines = [node['Resources'] for node in ray.nodes() if node['Alive']]
        gpus = sum(int(machine.get('GPU', 0)) for machine in machines)
        self.gpu = bool(gpus) if gpu is None else gpu
        self._share = {'CPU': cpus, **({'GPU': 1} if self.gpu else {})}
        if not self._room():
            most = ' and '.join(_number(max(int(machine.get(kind, 0)) for machine in machines), kind)
                                for kind in self._share)
            raise ConfigError(f'engine: no machine of the Ray cluster has room for a worker with {self._needs()}; the '
                              f'largest has {most}')

    def __str__(self) -> str:
        room = self._room()
        return (f'{_number(sum(room), "worker")} with {self._needs()} on {_number(len(room), "machine")} of a Ray '
                'cluster')

    def _room(self) -> list[int]:
        """How many workers each machine has room for, whether they are there or not; without those that have none."""
        import ray
        return list(filter(None, (min(int(node['Resources'].get(kind, 0) // n) for kind, n in self._share.items())
                                  for node in ray.nodes() if node['Alive'])))

    def _needs(self) -> str:
        return ' and '.join(_number(n, kind) for kind, n in self._share.items())

    def run(
        self, tasks: Mapping[str, S], start: Callable[[], Work[S, T]], done: Callable[[T], object]
    ) -> None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
        remote: Any = ray.remote  # which takes more than its types say
        actor = remote(num_cpus=self._share['CPU'], num_gpus=self._share.get('GPU', 0), max_restarts=0)(_Worker)
        waiting, workers, had_room = deque(tasks), list[_Hired](), False
        calls: dict[Any, tuple[_Hired, Optional[str]]] = {}  # the task, or None for the worker's start
        lost: Counter[Optional[str]] = Counter()
        try:
            while waiting or any(worker.tasks for worker in workers):
                # As many workers as there is room and work for.
                left = len(waiting) + sum(len(worker.tasks) for worker in workers)
                wanted = min(sum(self._room()), left)
                if not wanted and had_room:
                    tqdm.write('the cluster has room for no worker any more; waiting for a machine', file=sys.stderr)
                had_room = wanted > 0
                for _ in range(wanted - len(workers)):
                    workers.append(_Hired(actor.remote()))
                    started = workers[-1].actor.start.options(name='start').remote(start, os.getcwd())
                    calls[started] = workers[-1], None
                # Tasks for those that are there; near the end, none that would wait for a worker to be done.
                for in_hand in range(_IN_HAND):
                    for worker in workers:
                        enough = len(waiting) > in_hand * len(workers)
                        if worker.ready and len(worker.tasks) == in_hand and enough:
                            task = waiting.popleft()
                            worker.tasks.append(task)
                            calls[worker.actor.do.options(name=task).remote(tasks[task])] = worker, task
                if not calls:  # all machines with room for a worker are lost, and others may join
                    time.sleep(_LOOK)
                    continue
                for call in ray.wait(list(calls), timeout=_LOOK)[0]:
                    if call not in calls:  # of a worker that was lost just now
                        continue
                    worker, task = calls.pop(call)
                    try:
                        result = ray.get(call)
                    except RayTaskError as error:
                        raise error.cause from error
                    except (RayActorError, OutOfMemoryError) as error:
                        ray.kill(worker.actor)  # it may be alive, and only out of reach
                        workers.remove(worker)
                        calls = {call: known for call, known in calls.items() if known[0] is not worker}
                        waiting.extendleft(reversed(worker.tasks))
                        _count_loss(lost, worker.tasks, error)
                        continue
                    lost[None] = 0
                    if task is None:
                        worker.ready = True
                        continue
                    worker.tasks.remove(task)
                    done(result)
        finally:
            for worker in workers:
                ray.kill(worker.actor)


def _number(n: int, what: str) -> str:
    return f'{n} {what}{"" if n == 1 else "s"}'


@dataclass
class _Hired:
    """A worker, as the driver knows it."""

    actor: Any
    ready: bool = False
    tasks: list[str] = field(default_factory=list)
    """Those that it has in hand."""


def _count_loss(lost: Counter[Optional[str]], tasks: Sequence[str], error: Exception) -> None:
    """Say that a worker was lost, and which tasks will be done again, or raise an error if that was so too often."""
    reason = str(error).strip().splitlines()[-1].split('. ')[0].strip()  # what follows guesses at causes
    for name in tasks or [None]:
        lost[name] += 1
        if lost[name] > _LOSSES:
            what = 'before their first task' if name is None else f'while they had {name} in hand'
            raise LostWorkersError(f'{lost[name]} workers were lost {what}; of the last one Ray says: '
                                   f'{reason}') from error
    again = f'; {" and ".join(tasks)} will be done again' if tasks else ''
    tqdm.write(f'a worker was lost ({reason}){again}', file=sys.stderr)


class _Worker:
    """An actor: a process somewhere in the cluster, which does the tasks that it is given one after the other."""

    def start(self, start: Callable[[], Work[Any, Any]], folder: str) -> None:
        """Make the work, in the folder in which the driver is, so that relative paths lead where they lead there."""
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
        note = f'on the machine {socket.gethostname()}'
        if note not in getattr(error, '__notes__', ()):
            error.add_note(note)
        raise
