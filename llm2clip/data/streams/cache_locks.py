# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""One run at a time in a cache, and none that is kept out by a run that was killed.

Streaming registers the folders that a dataset uses in shared memory, and refuses a cache that is registered.  Shared
memory outlives a killed run, a file lock does not.

Of Streaming 0.13 this relies on the names in shared memory, six digits that all names of a dataset begin with, and on
`_unpack_locals`, which reads the folders from the one that ends in ``_locals``.
"""

import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from composer.utils import dist
from streaming.base.constant import LOCALS
from streaming.base.shared.prefix import _unpack_locals

from llm2clip.data.streams.verified_stream import ShardError

__all__ = ['claim_caches']

_LOCK_FILE = '.in_use'
_LOCK_SECONDS = 30.0


def claim_caches(folders: Iterable[str]) -> list[BinaryIO]:
    """Lock caches for this process and its children, and forget killed runs that used them.

    Returns:
        The locks, which hold while they are open; only the first rank of a node has any.

    Raises:
        ShardError: Another run uses one of the folders.
    """
    locks: list[BinaryIO] = []
    if dist.get_local_rank() == 0:
        caches = set(folders)
        for folder in sorted(caches):
            os.makedirs(folder, exist_ok=True)
            lock = open(os.path.join(folder, _LOCK_FILE), 'wb')  # noqa: SIM115
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise ShardError(f'{folder} is the cache of another run that is still alive')
                time.sleep(0.2)
            locks.append(lock)
        _forget_killed_runs(caches)
    dist.barrier()
    return locks


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_killed_runs(caches: set[str]) -> None:
    for registered in Path('/dev/shm').glob(f'[0-9]*_{LOCALS}'):
        if caches.intersection(_unpack_locals(registered.read_bytes())[0]):
            for segment in registered.parent.glob(f'{registered.name.partition("_")[0]}_*'):
                segment.unlink(missing_ok=True)
