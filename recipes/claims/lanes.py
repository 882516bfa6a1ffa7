# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings side by side: two with a thread each do more than one after the other with two threads."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

LANES = 2


def run(script: str, *arguments: str, log: Path, lane: Path = Path()) -> None:
    """A script in a process of its own: with one thread in a lane, otherwise with all.

    Args:
        script: Its path.
        *arguments: Its arguments.
        log: Gets the output.
        lane: The folder that it runs in.

    Raises:
        RuntimeError: It failed; with the end of its output.
    """
    threads = {'OMP_NUM_THREADS': '1'} if lane != Path() else {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        done = subprocess.run([sys.executable, script, *arguments], stdout=file, stderr=subprocess.STDOUT, cwd=lane,
                              env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(f'{log.read_text()[-4000:]}\n{script} {" ".join(arguments)} failed')


def in_lanes(folder: Path, jobs: Sequence[Any], do: Callable[[Any, Path], None]) -> None:
    """Do `LANES` jobs at a time and say how long the rest will take; after one has failed, none is begun.

    Args:
        folder: For the lanes.
        jobs: What is to be done.
        do: (job, lane) -> None.  In a lane every path leads where it does here, but is another one, since Streaming
            lets one process at a time use a path.
    """
    lanes: SimpleQueue[Path] = SimpleQueue()
    for i in range(LANES):
        lanes.put(_make_lane(folder / f'lane{i}'))
    start, done = time.monotonic(), 0

    def work(job: Any) -> None:
        nonlocal done
        lane = lanes.get()
        try:
            do(job, lane)
        finally:
            lanes.put(lane)
        done += 1
        left = (time.monotonic() - start) / done * (len(jobs) - done)
        print(f'{done} of {len(jobs)} done; about {left / 60:.0f} min left', flush=True)

    with ThreadPoolExecutor(LANES) as pool:
        try:
            for _ in pool.map(work, jobs):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make_lane(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in Path.cwd().iterdir():
        if not (link := folder / entry.name).is_symlink():
            link.symlink_to(entry)
    return folder
