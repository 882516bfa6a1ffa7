# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A long training on a remote that misbehaves needs as much of everything at its end as at its beginning.

In the environment, `SOAK_MINUTES` says how long it is.
"""

import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import COMMON, COMPOSER, ROOT, losses, may_have_own_memory
from parts import make_samples, write_dataset, write_sidecar
from remotes import FaultyProxy, s3_environment, s3_server

MINUTES = float(os.environ.get('SOAK_MINUTES', '10'))
SAMPLES, EVAL_SAMPLES, RANKS, WORKERS = 512, 32, 2, 2
EVERY = 100  # batches between evaluations
# How much the median of the last third may be above that of the first third.  PSS also depends on what else runs on the
# machine: pages of libraries are shared.
MARGINS = {'processes': 1.0, 'rss_mb': 1.03, 'pss_mb': 1.1, 'files': 1.05, 'threads': 1.05, 'shm_bytes': 1.0,
           'shm_files': 1.0, 'temporary_files': 1.2}


def measure(process: psutil.Process) -> dict[str, float]:
    """What a process and all below it use together."""
    found: dict[str, float] = dict.fromkeys(('processes', 'rss_mb', 'pss_mb', 'files', 'threads'), 0)
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            memory = one.memory_full_info()
            for name, value in (('processes', 1), ('rss_mb', memory.rss / 2**20), ('pss_mb', memory.pss / 2**20),
                                ('files', one.num_fds()), ('threads', one.num_threads())):
                found[name] += value
    shared = _sizes(Path(f'/proc/{process.pid}/root/dev/shm'))
    return {**found, 'shm_bytes': sum(shared), 'shm_files': len(shared)}


def _sizes(folder: Path, but: str = '-') -> list[int]:
    """Of the files in a folder, some of which may be removed meanwhile, except those of a suffix."""
    sizes = []
    for path in folder.rglob('*'):
        with suppress(FileNotFoundError):
            if path.suffix != but and path.is_file():
                sizes.append(path.stat().st_size)
    return sizes


@pytest.fixture
def remote(teacher_folder: Path, tmp_path: Path) -> Iterator[tuple[FaultyProxy, dict[str, str]]]:
    """A server of datasets of many shards and of a place for checkpoints: its proxy, and the environment for it."""
    bucket = tmp_path / 'served/bucket'
    for name, samples in (('train', make_samples(SAMPLES)), ('eval', make_samples(EVAL_SAMPLES, prefix='e'))):
        write_dataset(samples, bucket / name, size_limit='2kb')
        write_sidecar(bucket / name / 'train', bucket / name / 'embeddings', teacher_folder)
    with s3_server(bucket.parent) as port:
        proxy = FaultyProxy(port, ['503', 'truncate', 'drop', 'delay'])
        # Composer gives up a checkpoint, and the run, after boto's three attempts.
        yield proxy, {**s3_environment(proxy.port), 'AWS_MAX_ATTEMPTS': '10', 'OMP_NUM_THREADS': '1'}
        proxy.close()


def arguments(folder: Path, cache_limit: int) -> list[str]:
    """Of a stage 2 that reads everything from the remote, again and again, and writes its checkpoints there."""
    streams = [f'{data}.streams.s.{key}={value}' for data, name in (('train_data', 'train'), ('eval_data', 'eval'))
               for key, value in (('remote', f's3://bucket/{name}/train'), ('local', folder / f'cache/{name}/images'),
                                  ('embeddings.tiny.remote', f's3://bucket/{name}/embeddings'),
                                  ('embeddings.tiny.local', folder / f'cache/{name}/embeddings'))]
    return [*COMMON, *streams, 'model.vision={name: test_efficientnet, pretrained: false, image_size: 32}',
            'model.adapter.depth=1', 'model.embed_dim=16', 'optimizer.lr=0.001', 'max_duration=1000000ba',
            f'eval_interval={EVERY}ba', f'save_interval={EVERY}ba', 'checkpoint_folder=s3://bucket/run/checkpoints',
            f'train_data.num_workers={WORKERS}', 'train_data.caption_mix={short: 0.5, long: 0.5}',
            f'train_data.cache_limit={cache_limit}', f'eval_data.cache_limit={cache_limit}', 'eval_data.num_workers=2',
            'eval_data.num_canonical_nodes=4', 'eval_data.caption_mix={short: 1.0}', 'global_eval_batch_size=8',
            f'save_folder={folder / "run"}']


def assert_no_growth(rows: list[dict[str, float]]) -> None:
    """The last third needs no more than the first one."""
    third = len(rows) // 3
    assert third >= 2, f'only {len(rows)} measurements'
    for name, margin in MARGINS.items():
        first, last = (statistics.median(row[name] for row in part) for part in (rows[:third], rows[-third:]))
        print(f'{name}: {first:g} → {last:g}', flush=True)
        assert last <= first * margin, f'{name} grew from {first:g} to {last:g}'


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(MINUTES * 60 + 1200)
def test_a_long_run_on_a_bad_connection_does_not_grow(
    remote: tuple[FaultyProxy, dict[str, str]], tmp_path: Path
) -> None:
    proxy, env = remote
    # Not in `tmp_path`: the path of a socket may be 107 characters long.
    temporary = Path(tempfile.mkdtemp())
    shards, indexes = ([path.stat().st_size for path in (tmp_path / 'served').rglob(name)]
                       for name in ('*.mds', 'index.json'))
    # Room for one shard in ten; the index counts too.
    args, every = arguments(tmp_path, sum(indexes) + sum(shards) // 10), min(60.0, MINUTES * 60 / 30)
    log, own = tmp_path / 'run.log', ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', '--']
    with log.open('w') as file:
        process = psutil.Popen(
            [*(own if may_have_own_memory() else []), str(COMPOSER), '-n', str(RANKS),
             str(ROOT / 'recipes/train_stage2.py'),
             *args], cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **env, 'TMPDIR': str(temporary)})
    rows: list[dict[str, Any]] = []
    try:
        deadline = time.monotonic() + 900
        # What is made once, such as the workers of the evaluation, is there after three of them.
        while max(losses(tmp_path / 'run'), default=0) < 3 * EVERY:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(1)
        begun = time.monotonic()
        while (now := time.monotonic() - begun) < MINUTES * 60:
            assert process.poll() is None, log.read_text()[-5000:]
            # Composer keeps some 33 bytes per checkpoint until the run ends: latest.1.symlink, latest.2.symlink, …
            rows.append({'seconds': round(now), 'step': max(losses(tmp_path / 'run')), **measure(process),
                         'temporary_files': len(_sizes(temporary, but='.symlink'))})
            print(rows[-1], flush=True)
            time.sleep(max(0.0, begun + len(rows) * every - time.monotonic()))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)
    assert rows[-1]['step'] > rows[0]['step'] + EVERY and proxy.requests > 2 * SAMPLES
    assert_no_growth(rows)
