# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Engines without a cluster; tests/recipes/test_ray.py has one."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import pytest
from parts import make_samples
from recipes_in_process import REQUIRED, run_recipe

from llm2clip.config import ConfigError, PrepareConfig
from llm2clip.config.files import load_config
from llm2clip.data.convert.samples import Dropped, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.engine import Engine, LocalEngine, RayEngine, Work


@pytest.mark.parametrize('num_workers', [1, 2])
def test_local_processes_do_tasks_that_cannot_be_pickled(num_workers: int) -> None:
    def start() -> Work[Callable[[], int], tuple[int, int]]:
        return lambda tasks, done: [done((task(), os.getpid())) for task in tasks] and None

    found: list[tuple[int, int]] = []
    engine = LocalEngine(num_workers)
    engine.run({f'{i}': lambda i=i: i for i in range(20)}, start, found.append)
    assert sorted(number for number, _ in found) == [*range(20)]
    assert ({process for _, process in found} == {os.getpid()}) is (num_workers == 1)
    assert str(engine) == ('1 process' if num_workers == 1 else '2 processes')

    def fail() -> int:
        raise LookupError('no such thing')

    with pytest.raises(LookupError, match='no such thing'):
        engine.run({'a': fail, 'b': lambda: 1, 'c': lambda: 2}, start, found.append)


def test_ray_is_refused_where_others_give_out_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='num_shards: 2, expected 1 with engine=ray'):
        load_config(PrepareConfig, [*REQUIRED['prepare_data'], 'engine=ray', 'num_shards=2'])
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ConfigError, match=r'engine: ray needs the package ray: pip install "llm2clip\[ray\]"'):
        RayEngine()
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ConfigError, match='engine: ray .* without ranks'):
        RayEngine()


def test_a_part_that_another_machine_has_written_elsewhere_is_missed(tmp_path: Path) -> None:
    class Elsewhere(Engine):
        def run(
            self, tasks: Mapping[str, Any], start: Callable[[], Work[Any, Any]], done: Callable[[Any], object]
        ) -> None:
            for _ in tasks:
                done(6)

    with pytest.raises(FileNotFoundError, match=r'train/part-all/part\.json, which another machine .* need out_remote'):
        write_splits({'train': one_part(make_samples(6))}, Dropped(), tmp_path / 'out', engine=Elsewhere())


def test_the_recipe_gives_shards_to_the_engine(
    image_dataset: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    class InThisProcess(LocalEngine):
        gpu = False

        def __init__(self, cpus: int, gpu: Optional[bool]) -> None:
            super().__init__()
            assert (cpus, gpu) == (3, None)

    monkeypatch.setattr('llm2clip.engine.RayEngine', InThisProcess)
    args = [f'teacher={teacher_folder}', f'datasets.a.local={image_dataset}', f'datasets.b.local={image_dataset}']
    run_recipe(monkeypatch, 'extract_embeddings', *args, f'out={tmp_path}/ranks', 'device=cpu')
    run_recipe(monkeypatch, 'extract_embeddings', *args, f'out={tmp_path}/engine', 'engine=ray', 'worker_cpus=3')
    said = capsys.readouterr().out
    shards = len([*image_dataset.rglob('*.mds')])
    assert f'a: 128 captions in {shards} of {shards} shards are to be embedded, by 1 process' in said
    counts = re.findall(r'^(.): (\d+ shards, .*)', said, re.M)
    assert [name for name, _ in counts] == ['a', 'b', 'a', 'b'] and len({text for _, text in counts}) == 1
    for name in ('a', 'b'):
        files = {path.name: path.read_bytes() for path in (tmp_path / 'ranks' / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / 'engine' / name).iterdir()} and files
    run_recipe(monkeypatch, 'extract_embeddings', *args, f'out={tmp_path}/engine', 'engine=ray', 'worker_cpus=3')
    assert f'a: 0 captions in 0 of {shards} shards' in capsys.readouterr().out
