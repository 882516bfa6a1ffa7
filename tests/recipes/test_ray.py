# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A real Ray cluster of several nodes, of which one is killed while it works and one joins late, and an object store.

It writes what the processes of one machine write, byte for byte.  On a loaded machine Ray loses nodes by itself: what
needs them to stay, and takes a minute there, is for `make test-slow`.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Optional, TypeVar

import parts
import pytest
import torch
from composer.devices import DeviceCPU
from launched import contents
from parts import make_samples
from recipes_in_process import run_recipe
from remotes import free_port, s3_environment, s3_server

import llm2clip.engine
from llm2clip.config import DatasetConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.engine import LostWorkersError, RayEngine, Work
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.remotes import OutputFolder
from llm2clip.teacher.caption_teacher import CaptionTeacher
from llm2clip.teacher.extraction import EmbeddingsDataset, extract_by
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.teacher.sources import TeacherFolder

ray = pytest.importorskip('ray', reason='the package ray is not installed')
cluster_utils = pytest.importorskip('ray.cluster_utils', reason='the package ray is not installed')

T = TypeVar('T')

CHANGING = r'\.llm2clip|config\.yaml|seconds\.json'  # files of other bytes in each run
STORE = 100_000_000  # bytes, the least that Ray takes is 75 MB
PATIENCE = 200.0  # seconds; other work may take most of the machine

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures('no_leftovers')]


class Nodes:
    """A cluster: a head that does no work, and nodes with room for one worker each."""

    def __init__(self, served: Path) -> None:
        self.served = served  # whose folders are buckets
        self._cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={
            'num_cpus': 0, 'include_dashboard': False, **_options()})
        self.address = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self) -> None:
        node = self._cluster.add_node(num_cpus=1, **_options())
        self._nodes[node.node_id] = node

    def kill(self, node_id: str) -> None:
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def to_two(self) -> None:
        while len(self._nodes) < 2:
            self.add()

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def _options() -> dict[str, int]:
    """Of a node.  If its agents chose their own ports, it would die where they need more than 15 seconds for it."""
    agents = ('metrics_agent_port', 'metrics_export_port', 'runtime_env_agent_port', 'dashboard_agent_listen_port')
    return {'object_store_memory': STORE, **{name: free_port() for name in agents}}


@pytest.fixture(scope='module')
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    served = tmp_path_factory.mktemp('served')
    (served / 'bucket').mkdir()
    # What the test makes by itself, functions and classes, goes to the workers as a whole.
    for module in (sys.modules[__name__], parts):
        ray.cloudpickle.register_pickle_by_value(module)
    with pytest.MonkeyPatch.context() as patch, s3_server(served) as port:
        for name, value in {**s3_environment(port), 'RAY_USAGE_STATS_ENABLED': '0', 'RAY_AUTH_MODE': 'disabled',
                            'RAY_health_check_period_ms': '500', 'OMP_NUM_THREADS': '1'}.items():
            patch.setenv(name, value)
        patch.setattr(llm2clip.engine, '_POLL_SECONDS', 0.2)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        found = Nodes(served)
        found.to_two()
        ray.init(address=found.address, log_to_driver=False)
        try:
            yield found
        finally:
            found.close()
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place


class Elsewhere(OutputFolder):
    """A folder that is another one on every node of the cluster, as on machines that share no disk."""

    def __reduce__(self) -> Any:
        return _of_this_node, (self.local, self.remote)


def _of_this_node(local: Path, remote: Optional[str]) -> OutputFolder:
    node = ray.get_runtime_context().get_node_id()
    return OutputFolder(local.parent / f'of-{node}' / local.name, remote)


def wait_for_three(met: Path) -> None:
    """Go on when three nodes have come here, dead ones included."""
    (met / ray.get_runtime_context().get_node_id()).mkdir(parents=True, exist_ok=True)
    wait_until(lambda: len([*met.iterdir()]) > 2)


def wait_until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def disturbed(nodes: Nodes, met: Path, job: Callable[[], T]) -> T:
    """What a job returns; while two nodes wait for a third one, one of them is killed, and then the third comes."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(job)
        wait_until(lambda: result.done() or met.is_dir() and len([*met.iterdir()]) == 2)
        if not result.done():
            nodes.kill(next(met.iterdir()).name)
            nodes.add()
        return result.result()


def doubled(folder: Path) -> Work[int, int]:
    """Doubles numbers, and notes which it was given; 13 is bad luck, and -1 kills the process."""
    def work(tasks: Iterable[int], done: Callable[[int], object]) -> None:
        for task in tasks:
            with (folder / str(task)).open('a') as file:
                file.write('x')
            if task == -1:
                os._exit(1)
            if task == 13:
                error = FileError(f'{os.getcwd()}: 13')
                error.add_note('bad luck')
                raise error
            done(2 * task)

    return work


def test_results_come_and_an_error_ends_the_job(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine, results = RayEngine(), []
    assert str(engine) == '2 workers with 1 CPU on 2 machines of a Ray cluster' and not engine.gpu
    engine.run({f'task {i}': i for i in range(12)}, partial(doubled, tmp_path), results.append)
    assert sorted(results) == [2 * i for i in range(12)]
    with pytest.raises(FileError, match=f'{tmp_path}: 13') as caught:
        engine.run({f'task {i}': i for i in range(13, 40)}, partial(doubled, tmp_path), results.append)
    note, machine = caught.value.__notes__
    assert note == 'bad luck' and machine == f'on the machine {os.uname().nodename}'
    assert (tmp_path / '13').read_text() == 'x', 'an error of the data is tried again'
    assert not (tmp_path / '39').exists()
    with pytest.raises(ConfigError, match='has room for a worker with 3 CPUs; `ray status` shows'):
        RayEngine(3)


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_given_up(nodes: Nodes, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(LostWorkersError, match='4 workers were lost while they had deadly in hand'):
        RayEngine().run({'deadly': -1}, partial(doubled, tmp_path), print)
    assert (tmp_path / '-1').read_text() == 4 * 'x'
    assert capfd.readouterr().err.count('deadly will be done again') == 3


@pytest.mark.slow
def test_embeddings_survive_a_lost_and_a_late_node(
    nodes: Nodes, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    nodes.to_two()
    images, local, met = tmp_path / 'images', tmp_path / 'out/local', tmp_path / 'met'
    write_splits({'train': one_part(make_samples(40))}, Dropped(), OutputFolder(images, 's3://bucket/images'),
                 WriterConfig(size_limit='2kb'))
    args = [f'teacher={teacher_folder}', f'datasets.local.local={images}/train', f'out={tmp_path}/out', 'device=cpu',
            'batch_tokens=64']
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    run_recipe(monkeypatch, 'extract_embeddings', *args)
    torch.set_num_threads(threads)
    expected = contents(local, CHANGING)

    def load() -> CaptionTeacher:
        teacher = TeacherFolder(teacher_folder).load(DeviceCPU(), batch_tokens=64)
        embed = teacher.embed_prepared
        teacher.embed_prepared = lambda *args, **options: (wait_for_three(met), embed(*args, **options))[1]
        return teacher

    embeddings = EmbeddingsDataset(DatasetConfig(str(tmp_path / 'cache'), 's3://bucket/images/train'),
                      Elsewhere(tmp_path / 'ray', 's3://bucket/embeddings'), settings={'precision': 'fp32'})
    engine, fingerprint = RayEngine(), teacher_fingerprint(teacher_folder)
    done = disturbed(nodes, met, lambda: extract_by(engine, [embeddings], load, fingerprint, 8 * 64))['ray']
    assert (done['captions'], done['absent']) == (80, 0) and done['shards'] > 5
    found = contents(nodes.served / 'bucket/embeddings', CHANGING)
    assert found == {**expected, 'teacher.json': found['teacher.json']}  # which names the remote
    assert len({path.parts[-3] for path in tmp_path.glob('of-*/ray/shard.*.json')}) == 2
    # One that the ranks began.
    for name in ('index.json', 'shard.00001.json', 'shard.00001.mds'):
        (local / name).unlink()
    capfd.readouterr()
    run_recipe(monkeypatch, 'extract_embeddings', *args, 'engine=ray')
    assert contents(local, CHANGING) == expected
    assert re.search(r'^local: 1 shards, ', capfd.readouterr().out, re.M)
