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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
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
# Tasks that a Ray worker has in hand: the one that it does, the one that it reads meanwhile, and one more, so that it
# never waits for the driver.
_IN_HAND = 3


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
    have room for, those that join later included; a task is given to a worker that waits for one.  The tasks of a
    worker that is lost, with its machine or alone, are given to others.  Work, tasks and results are pickled.

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
            _connect()
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
        remote: Any = ray.remote  # which takes more than its types say
        actor = remote(num_cpus=self._share['CPU'], num_gpus=self._share.get('GPU', 0), max_restarts=0,
                       max_concurrency=1 + _IN_HAND)(_Worker)
        pool = _Pool(tasks, start, actor.remote, lambda: sum(self._room()))
        try:
            while pool.goes_on():
                for result in pool.next_results():
                    done(result)
        finally:
            pool.close()


def _number(n: int, what: str) -> str:
    return f'{n} {what}{"" if n == 1 else "s"}'


def _connect() -> None:
    import ray

    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(log_to_driver=False)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)


@dataclass
class _Hired:
    """A worker, as the driver knows it."""

    actor: Any
    ready: bool = False
    tasks: list[str] = field(default_factory=list)
    """Those that it has in hand."""


class _Pool:
    """The workers of one call of `RayEngine.run`, and what is left to do."""

    def __init__(self, tasks: Mapping[str, Any], start: Callable[[], Work[Any, Any]], hire: Callable[[], Any],
                 room: Callable[[], int]) -> None:
        self._tasks, self._start, self._hire, self._room = tasks, start, hire, room
        self._waiting = deque(tasks)
        self._workers: list[_Hired] = []
        self._calls: dict[Any, tuple[_Hired, Optional[str]]] = {}  # the task, or None for the worker's start
        self._lost: Counter[Optional[str]] = Counter()
        self._had_room = False

    def goes_on(self) -> bool:
        return bool(self._waiting) or any(worker.tasks for worker in self._workers)

    def next_results(self) -> Iterator[Any]:
        """The results that have come within a while."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
        self._hire_workers()
        self._hand_out()
        if not self._calls:  # all machines with room for a worker are lost, and others may join
            time.sleep(_LOOK)
            return
        for call in ray.wait(list(self._calls), timeout=_LOOK)[0]:
            if call not in self._calls:  # of a worker that was lost just now
                continue
            worker, task = self._calls.pop(call)
            try:
                result = ray.get(call)
            except RayTaskError as error:
                raise error.cause from error
            except (RayActorError, OutOfMemoryError) as error:
                self._drop(worker, task, error)
                continue
            self._lost[None] = 0
            if task is None:
                worker.ready = True
                continue
            worker.tasks.remove(task)
            yield result

    def _hire_workers(self) -> None:
        """As many as there is room and work for."""
        left = len(self._waiting) + sum(len(worker.tasks) for worker in self._workers)
        wanted = min(self._room(), left)
        if not wanted and self._had_room:
            tqdm.write('the cluster has room for no worker any more; waiting for a machine', file=sys.stderr)
        self._had_room = wanted > 0
        for _ in range(wanted - len(self._workers)):
            worker = _Hired(self._hire())
            self._workers.append(worker)
            self._calls[worker.actor.start.options(name='start').remote(self._start, os.getcwd())] = worker, None

    def _hand_out(self) -> None:
        """Give tasks to workers that are there; near the end, none that would wait for a worker to be done."""
        for in_hand in range(1, 1 + _IN_HAND):
            for worker in self._workers:
                enough = len(self._waiting) > (in_hand - 1) * len(self._workers)
                if worker.ready and len(worker.tasks) < in_hand and enough:
                    task = self._waiting.popleft()
                    worker.tasks.append(task)
                    self._calls[worker.actor.do.options(name=task).remote(self._tasks[task])] = worker, task

    def _drop(self, worker: _Hired, task: Optional[str], error: Exception) -> None:
        """Give the tasks of a worker that was lost to others."""
        import ray
        ray.kill(worker.actor)  # it may be alive, and only out of reach
        self._workers.remove(worker)
        self._calls = {call: known for call, known in self._calls.items() if known[0] is not worker}
        self._waiting.extendleft(reversed(worker.tasks))
        reason = str(error).strip().splitlines()[-1].split('. ')[0].strip()  # what follows guesses at causes
        for name in worker.tasks or [None]:
            self._lost[name] += 1
            if self._lost[name] > _LOSSES:
                what = 'before their first task' if name is None else f'while they had {name} in hand'
                raise LostWorkersError(f'{self._lost[name]} workers were lost {what}; of the last one Ray says: '
                                       f'{reason}') from error
        again = f'; {" and ".join(worker.tasks)} will be done again' if worker.tasks else ''
        tqdm.write(f'a worker was lost ({reason}){again}', file=sys.stderr)

    def close(self) -> None:
        import ray
        for worker in self._workers:
            ray.kill(worker.actor)


class _Worker:
    """An actor: a process somewhere in the cluster.

    Its calls come in threads of their own, one for each task that it has in hand; one more thread does the tasks, in
    order.  The work is called for those that are in hand, and again when it has done them and more have come.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._results: deque[Future[Any]] = deque()
        self._one_at_a_time = threading.Lock()

    def start(self, start: Callable[[], Work[Any, Any]], folder: str) -> None:
        """Make the work, in the folder in which the driver is, so that relative paths lead where they lead there."""
        with _naming_the_machine():
            os.makedirs(folder, exist_ok=True)
            os.chdir(folder)
            work = start()
        threading.Thread(target=self._do_all, args=(work,), daemon=True).start()

    def do(self, task: Any) -> Any:
        result: Future[Any] = Future()
        with self._one_at_a_time:
            self._results.append(result)
            self._tasks.put(task)
        with _naming_the_machine():
            return result.result()

    def _do_all(self, work: Work[Any, Any]) -> None:
        try:
            while True:
                work(self._in_hand(), lambda result: self._results.popleft().set_result(result))
        except BaseException as error:  # ends the job, whichever of the tasks in hand it is about
            self._results.popleft().set_exception(error)

    def _in_hand(self) -> Iterator[Any]:
        """Tasks, from when there is one until there is none."""
        yield self._tasks.get()
        while not self._tasks.empty():
            yield self._tasks.get()


@contextmanager
def _naming_the_machine() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        note = f'on the machine {socket.gethostname()}'
        if note not in getattr(error, '__notes__', ()):
            error.add_note(note)
        raise
