# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The loader of a node with 8 ranks of 8 workers, for hours: over a bad connection, with a cache too small for the
dataset, and killed again and again.  SOAK_MINUTES says how long, SOAK_FOLDER where its records stay."""

import json
import os
import random
import signal
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from launched import ROOT, Launched
from parts import make_samples, write_dataset, write_sidecar
from remotes import FaultyProxy, s3_environment, s3_server

RANKS, WORKERS, BATCH, SAMPLES = 8, 8, 128, 6400
MINUTES = float(os.environ.get('SOAK_MINUTES', '10'))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(MINUTES * 60 + 900)]


def describe(pid: int) -> str:
    """What a process is, its state, and where in the kernel it waits."""
    with suppress(OSError):
        command, state, waits = (Path(f'/proc/{pid}/{name}').read_text() for name in ('cmdline', 'stat', 'wchan'))
        return f'{pid}: {command[-100:]!r} {state.rpartition(")")[2].split()[0]} {waits}'
    return f'{pid}: it has just ended'


def processes_of(group: int) -> list[int]:
    """All living processes whose group or session is that of a run."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            fields = (entry / 'stat').read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if fields[0] != 'Z' and group in (int(fields[2]), int(fields[3])):
            found.append(int(entry.name))
    return found


def measured(pids: list[int]) -> dict[str, float]:
    """What processes hold together; memory that they share counts once."""
    total: dict[str, float] = defaultdict(float)
    for pid in pids:
        try:
            for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
                if line.startswith('Pss:'):
                    total['gib'] += int(line.split()[1]) / 2**20
            total['files'] += len(os.listdir(f'/proc/{pid}/fd'))
            total['threads'] += len(os.listdir(f'/proc/{pid}/task'))
        except OSError:
            continue
        with suppress(OSError):
            memory = os.statvfs(f'/proc/{pid}/root/dev/shm')
            total['shm_mib'] = (memory.f_blocks - memory.f_bfree) * memory.f_frsize / 2**20
    return {**total, 'processes': len(pids)}


def batches(folder: Path) -> dict[tuple[int, int], dict[int, list[int]]]:
    """(Epoch, batch) -> rank -> its samples; what was read again after a kill has to be the same."""
    found: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(dict)
    for rank in range(RANKS):
        for line in (folder / f'rank{rank}.jsonl').read_text().splitlines():
            if not line.endswith(']]'):  # cut by a kill
                continue
            epoch, batch, _, samples = json.loads(line)
            assert found[epoch, batch].setdefault(rank, samples) == samples
    return found


def test_a_node_reads_for_hours(teacher_folder: Path, tmp_path: Path) -> None:
    """Nothing is lost or read twice, and memory, files, threads and shared memory do not grow."""
    folder = Path(os.environ.get('SOAK_FOLDER', tmp_path / 'soak'))
    folder.mkdir(parents=True)
    # Each worker may exceed the limit of the cache by one shard, so shards have to be small for it to matter at all.
    write_dataset(make_samples(SAMPLES), tmp_path / 'served/bucket', size_limit='4kb')
    write_sidecar(tmp_path / 'served/bucket/train', tmp_path / 'served/bucket/embeddings', teacher_folder)
    draw, records, kills = random.Random(0), list[dict[str, Any]](), defaultdict[str, int](int)
    with s3_server(tmp_path / 'served') as port:
        proxy = FaultyProxy(port, ['503', 'truncate', 'drop', 'delay'], every=50)
        end = time.time() + 60 * MINUTES
        while time.time() < end:
            run = Launched([str(ROOT / 'tests/soak_rank.py'), str(folder), 's3://bucket', str(WORKERS), str(BATCH)],
                           folder / 'log.txt', RANKS, s3_environment(proxy.port), own=folder)
            begun, killed = time.time(), False
            stop = min(begun + draw.uniform(0.15, 0.3) * 60 * MINUTES, end)
            while run.poll() is None and time.time() < stop + 60:
                time.sleep(2)
                records.append({'run': begun, 'time': time.time(), **measured(processes_of(run.pid))})
                with (folder / 'records.jsonl').open('a') as file:
                    file.write(json.dumps(records[-1]) + '\n')
                if time.time() > stop and not killed:
                    killed = True
                    kind = draw.choice(['all', 'a process']) if stop < end else 'all'
                    kills[kind] += 1
                    if kind == 'all':
                        run.kill()
                    else:  # a rank or a worker; the run has to end by itself
                        os.kill(draw.choice(processes_of(run.pid)), signal.SIGKILL)
            assert killed, f'the run ended by itself: {(folder / "log.txt").read_text()[-3000:]}'
            assert run.poll() is not None, 'a run of which a process was killed did not end within a minute'
            patience = time.time() + 60
            while left := processes_of(run.pid):
                assert time.time() < patience, f'still there after their run: {[*map(describe, left)]}'
                time.sleep(0.5)
        faults = len(proxy.done)
        proxy.close()
    found = batches(folder)
    epochs = max(epoch for epoch, _ in found)
    for epoch in range(epochs):
        read = [sample for batch in range(SAMPLES // BATCH) for samples in found[epoch, batch].values()
                for sample in samples]
        assert sorted(read) == list(range(SAMPLES)), epoch
    report = {'epochs': epochs, 'batches': len(found), 'faults': faults, 'kills': kills,
              'samples per second': len(found) * BATCH / (records[-1]['time'] - records[0]['time']),
              **{name: [round(record[name], 2) for record in records if name in record][::max(len(records) // 20, 1)]
                 for name in ('gib', 'files', 'threads', 'shm_mib', 'processes')}}
    (folder / 'report.json').write_text(json.dumps(report))
    print(json.dumps(report, indent=1))
    assert epochs >= 1 and faults > 10
    for begun in {record['run'] for record in records}:
        assert_flat([record for record in records if record['run'] == begun and 'files' in record])


def assert_flat(run: list[dict[str, float]]) -> None:
    """What a run holds at its end is what it held after its beginning; a short run says nothing of that."""
    part = len(run) // 5
    # Shared memory is a few batches that come and go.
    for name, most in {'gib': 1.15, 'files': 1.15, 'threads': 1.15, 'shm_mib': 3}.items() if part >= 5 else ():
        early, late = (median(record[name] for record in some) for some in (run[part:2 * part], run[-part:]))
        assert late < most * early, f'{name}: {early} after the beginning, {late} at the end'
