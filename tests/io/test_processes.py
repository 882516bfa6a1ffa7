# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A worker that the system kills is told apart from other faults."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
from torch.utils.data import DataLoader, Dataset

from llm2clip.io.processes import is_killed_worker


def die(number: int = 0) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> None:
        die()


def test_killed_workers_are_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        list(DataLoader(Deadly(), num_workers=1, multiprocessing_context='fork'))
    assert is_killed_worker(error.value)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('fork')) as pool:
        with pytest.raises(BrokenProcessPool) as broken:
            pool.submit(die).result()
    assert is_killed_worker(broken.value)
    assert not is_killed_worker(RuntimeError('DataLoader worker (pid 3) has an opinion'))
