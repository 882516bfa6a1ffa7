# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Engines without a cluster; tests/recipes/test_ray.py has one."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from parts import make_samples
from recipes_in_process import REQUIRED

from llm2clip.config import PrepareConfig
from llm2clip.config.loading import load_config
from llm2clip.data.convert.samples import Dropped, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.engine import LocalEngine, RayEngine, Work
from llm2clip.errors import ConfigError


@pytest.mark.parametrize('num_workers', [1, 2])
def test_local_processes_do_tasks_that_cannot_be_pickled(num_workers: int) -> None:
    def start() -> Work[Callable[[], int], tuple[int, int]]:
        return lambda tasks, done: [done((task(), os.getpid())) for task in tasks] and None

    found: list[tuple[int, int]] = []
    engine = LocalEngine(num_workers)
    engine.run({f'{i}': lambda i=i: i for i in range(20)}, start, found.append)
    assert sorted(number for number, _ in found) == [*range(20)]
    assert ({process for _, process in found} == {os.getpid()}) is (num_workers == 1)

    def fail() -> int:
        raise LookupError('no such thing')

    with pytest.raises(LookupError, match='no such thing'):
        engine.run({'a': fail, 'b': lambda: 1, 'c': lambda: 2}, start, found.append)


def test_ray_is_refused_with_shards_or_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='^num_shards'):
        load_config(PrepareConfig, [*REQUIRED['prepare_data'], 'engine=ray', 'num_shards=2'])
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ConfigError, match=r'engine: ray needs the extra ray .*--extra ray, or pip'):
        RayEngine()
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ConfigError, match='engine: ray .* without ranks'):
        RayEngine()


def test_a_part_on_another_machine_is_reported_as_missing(tmp_path: Path) -> None:
    class Elsewhere(LocalEngine):
        def run(self, tasks: Mapping[str, Any], start: Any, done: Callable[[Any], object]) -> None:
            for _ in tasks:
                done(6)

    with pytest.raises(FileNotFoundError, match=r'train/part-all/part\.json, which another machine .* need out_remote'):
        write_splits({'train': one_part(make_samples(6))}, Dropped(), tmp_path / 'out', engine=Elsewhere())
