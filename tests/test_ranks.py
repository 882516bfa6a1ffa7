# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Shared work comes to the first rank in order; what happens to one rank ends the others; nodes agree."""

from pathlib import Path

import pytest
from launched import Launched

SCRIPT = """
import os, signal, time
import llm2clip.ranks
from llm2clip.ranks import (
    RankError, broadcast_from_rank0, initialize_gloo, once_per_node, raise_on_all_ranks, round_robin)

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
initialize_gloo()
say('took', list(round_robin(range(5), work)))
say('took', list(round_robin([], work)))
say('agrees on', broadcast_from_rank0(lambda: f'what {rank} says'))
for fails in (0, 3, 4):
    try:
        list(round_robin(range(5), lambda mine: work(mine, fails)))
    except Exception as error:
        say('heard', error)
try:
    broadcast_from_rank0(lambda: 1 / 0)
except ZeroDivisionError as error:
    say('heard', error)
llm2clip.ranks._POLL_SECONDS = 0.02
say('has', once_per_node(lambda: time.sleep(0.1) or f'what {rank} reads', 'teacher x'))  # longer than the other waits
os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')  # as if each rank was a node
say('has', once_per_node(lambda: 'the same', 'teacher x'))
for compute in (lambda: f'hash {rank}', lambda: 1 / (rank == '0')):
    try:
        once_per_node(compute, 'teacher x')
    except Exception as error:
        say('heard', error)
try:
    raise_on_all_ranks(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else None)
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
    heard = ['agrees on what 0 says', *(f'heard Odd: item {i}' for i in (0, 3, 4)), 'heard division by zero',
             'has what 0 reads', 'has the same',
             'heard the nodes do not have the same teacher x: node 1 has hash 1, node 0 has hash 0',
             'heard division by zero']
    first, second = ([line.replace('heard item', 'heard Odd: item') for line in lines] for lines in said)
    assert first[:-1] == ['took [0, 10, 20, 30, 40]', 'took []', *heard]
    assert first[-1].startswith('is alone: another rank has ended')
    assert second == ['took []', 'took []', *heard]
