# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Shared work comes to the first rank in order; what happens to one rank ends the others; nodes agree."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from launched import Launched

import llm2clip.ranks
from llm2clip.config import ConfigError
from llm2clip.ranks import agreed, in_turns, once_per_node, together

SCRIPT = """
import os, signal
from llm2clip.ranks import RankError, agreed, in_turns, is_first, meet, together

class Odd(Exception):  # no copy of it can be made
    def __init__(self, one, other):
        super().__init__(f'{one} {other}')

def work(items, fails=None):
    for item in items:
        if item == fails:
            raise Odd('item', item)
        yield 10 * item

def say(*words):
    os.write(1, f'rank {rank}: {" ".join(map(str, words))}\\n'.encode())

signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = os.environ['RANK']
meet()
say('took', list(in_turns(range(5), work)))
say('took', list(in_turns([], work)))
say('agrees on', agreed(lambda: f'what {rank} says'))
for fails in (0, 3, 4):
    try:
        list(in_turns(range(5), lambda mine: work(mine, fails)))
    except Exception as error:
        say('heard', error)
try:
    agreed(lambda: 1 / 0)
except ZeroDivisionError as error:
    say('heard', error)
try:
    together(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else None)
except RankError as error:
    say('is alone:', error)
"""


@pytest.mark.dist
def test_two_ranks(tmp_path: Path) -> None:
    script, log = tmp_path / 'script.py', tmp_path / 'log'
    script.write_text(SCRIPT)
    assert Launched([str(script)], log, 2, grace=60).wait(240) != 0
    lines = log.read_text().splitlines()
    said = [[line.removeprefix(f'rank {rank}: ') for line in lines if line.startswith(f'rank {rank}: ')]
            for rank in range(2)]
    heard = ['agrees on what 0 says', *(f'heard Odd: item {i}' for i in (0, 3, 4)), 'heard division by zero']
    first, second = ([line.replace('heard item', 'heard Odd: item') for line in lines] for lines in said)
    assert first[:-1] == ['took [0, 10, 20, 30, 40]', 'took []', *heard]
    assert first[-1].startswith('is alone: another rank has ended')
    assert second == ['took []', 'took []', *heard]


def test_one_rank_needs_no_others() -> None:
    assert list(in_turns([1, 2], lambda items: (2 * item for item in items))) == [2, 4]
    assert agreed(lambda: 3) == together(lambda: 3) == once_per_node(lambda: 3, 'teacher x') == 3


class _Ranks(threading.local):
    """In place of `composer.utils.dist`, two nodes of two ranks, which are threads."""

    rank = 0
    said: list[Any] = [None] * 4  # noqa: RUF012
    barrier = threading.Barrier(4)

    def get_world_size(self) -> int:
        return 4

    def get_local_rank(self) -> int:
        return self.rank % 2

    def all_gather_object(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.barrier.wait(10)
        everything = list(self.said)
        self.barrier.wait(10)
        return everything


@pytest.fixture
def on_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """(rank -> result) -> results, or exceptions, of `once_per_node` on each rank."""
    ranks = _Ranks()
    monkeypatch.setattr(llm2clip.ranks, 'dist', ranks)
    monkeypatch.setattr(llm2clip.ranks, '_NEWS', 0.02)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)

    def run(compute: Callable[[int], Any]) -> list[Any]:
        def of_rank(rank: int) -> Any:
            ranks.rank = rank
            try:
                return once_per_node(lambda: compute(rank), 'teacher x')
            except Exception as error:
                return error

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(of_rank, range(4)))

    return run


def test_the_first_rank_of_each_node_computes(on_all: Callable) -> None:
    called = []

    def compute(rank: int) -> str:
        called.append(rank)
        time.sleep(0.1 * rank)  # longer than the others wait at once
        return 'the same'

    assert on_all(compute) == ['the same'] * 4 and sorted(called) == [0, 2]


def test_nodes_that_differ_are_named_on_all_ranks(on_all: Callable) -> None:
    errors = on_all(lambda rank: f'hash {rank}')
    assert [type(error) for error in errors] == [ValueError] * 4
    assert str(errors[3]) == 'the nodes do not have the same teacher x: node 1 has hash 2, node 0 has hash 0'


def test_an_error_of_one_node_is_that_of_all_ranks(on_all: Callable) -> None:
    def compute(rank: int) -> str:
        if rank == 2:
            raise ConfigError('no teacher on this node')
        return 'fine'

    assert [(type(error), str(error)) for error in on_all(compute)] == [(ConfigError, 'no teacher on this node')] * 4
