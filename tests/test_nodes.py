# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What one rank of a node does for all; ranks are threads here."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed

import llm2clip.nodes
from llm2clip.config import ConfigError
from llm2clip.nodes import once_per_node


class _Ranks(threading.local):
    """In place of `composer.utils.dist`, two nodes of two ranks."""

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
    monkeypatch.setattr(llm2clip.nodes, 'dist', ranks)
    monkeypatch.setattr(llm2clip.nodes, '_PATIENCE', 0.02)
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


def test_a_process_alone_computes() -> None:
    assert once_per_node(lambda: 3, 'teacher x') == 3
