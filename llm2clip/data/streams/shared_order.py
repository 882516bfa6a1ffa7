# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The order of an epoch in a node's shared memory, a piece at a time, written by one process for all."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Optional

import numpy as np
from numpy.typing import NDArray
from streaming.base.constant import TICK

from llm2clip.data.streams.epoch_order import EpochOrder

__all__ = ['OrderWriter', 'SampleIds', 'forget_pieces', 'shared_bytes']

_PIECE_SAMPLES, _PIECE_BATCHES = 1 << 22, 16
# Nobody is so many pieces behind another.
_KEPT = 3


def _piece_batches(order: EpochOrder) -> int:
    """Batches of a worker in a piece."""
    readers = order.readers
    return max(_PIECE_SAMPLES // (readers.ranks * readers.workers * readers.batch), _PIECE_BATCHES)


def shared_bytes(samples: int) -> int:
    """What the order of an epoch takes of a node's shared memory.

    Args:
        samples: Of the epoch, that the node reads.
    """
    return 8 * min(samples, _KEPT * _PIECE_SAMPLES)


def forget_pieces(name: Path) -> None:
    """Remove what was written under a name."""
    for path in name.parent.glob(f'{name.name}_*'):
        path.unlink(missing_ok=True)


class OrderWriter:
    """Writes the pieces of an epoch, each while the one before it is read.

    Args:
        order: Of the epoch.
        node: Whose samples are written.
        name: The pieces are files whose names begin so.
        on_error: Told of what goes wrong.
    """

    def __init__(self, order: EpochOrder, node: int, name: Path, on_error: Callable[[Future], None]) -> None:
        self._order, self._node, self._name, self._on_error = order, node, name, on_error
        self._batches = _piece_batches(order)
        self._thread = ThreadPoolExecutor(1)
        self._begun = 0
        # Runs when a worker ends, too, which `atexit` does not.
        self._forget = Finalize(self, forget_pieces, (name,), exitpriority=0)
        self.go_on(0)

    def go_on(self, piece: int) -> None:
        """Write this piece and the next, if they are not there yet."""
        while self._begun <= piece + 1 and self._begun * self._batches < self._order.batches:
            self._thread.submit(self._write, self._begun).add_done_callback(self._on_error)
            self._begun += 1

    def close(self) -> None:
        """Remove all pieces."""
        self._thread.shutdown(cancel_futures=True)
        self._forget()

    def _write(self, piece: int) -> None:
        begin = piece * self._batches
        ids = self._order.piece(self._node, begin, begin + self._batches)
        path = _path(self._name, piece)
        with path.with_suffix('.tmp').open('wb') as file:
            np.save(file, ids)
        path.with_suffix('.tmp').rename(path)
        _path(self._name, piece - _KEPT).unlink(missing_ok=True)


class SampleIds:
    """The samples that one worker reads in an epoch, -1 where there is none; indexed as an array ``(N,)``.

    Args:
        order: Of the epoch.
        name: As for the node's `OrderWriter`.
        of: Node, rank and worker.
        writer: The node's, in the process that has it.
        check: Called while a piece is waited for; raises an error if none will come.

    Attributes:
        count: How many samples there are.
    """

    def __init__(
        self, order: EpochOrder, name: Path, of: tuple[int, int, int], writer: Optional[OrderWriter],
        check: Callable[[], None],
    ) -> None:
        self.count = order.count(*of)
        self._length, self._piece = order.batches * order.readers.batch, _piece_batches(order) * order.readers.batch
        self._name, self._of, self._writer, self._check = name, of, writer, check
        self._pieces: dict[int, NDArray[np.int64]] = {}
        self._reading = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> int:
        number, place = divmod(i, self._piece)
        piece = self._pieces.get(number)
        return int((self._read(number) if piece is None else piece)[place])

    def _read(self, number: int) -> NDArray[np.int64]:
        # Threads that download, wait and deliver are in different places.
        with self._reading:
            if number not in self._pieces:
                if self._writer is not None:
                    self._writer.go_on(number)
                path = _path(self._name, number)
                while not path.is_file():
                    self._check()
                    time.sleep(TICK)
                self._pieces.pop(number - 2, None)
                self._pieces[number] = np.load(path, mmap_mode='r')[self._of[1], self._of[2]].ravel().copy()
            return self._pieces[number]


def _path(name: Path, piece: int) -> Path:
    return name.with_name(f'{name.name}_{piece}.npy')
