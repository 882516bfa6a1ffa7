# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A run that is killed and resumed, at any moment and as often as you like, learns what an undisturbed one does."""

import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import SGD, SHARDED, Launched, losses, run, start, weights
from safetensors.torch import load_file

from llm2clip.training.callbacks.jsonl_logger import read_metrics

STEPS, SAVE, EVAL = 160, 4, 6


def adamw(args: list[str], steps: int, *extra: str) -> list[str]:
    """A rate at which weights that differ would soon differ a lot."""
    return [*args, 'optimizer.name=adamw', 'optimizer.lr=0.01', f'max_duration={steps}ba', *extra]


def kill_when(reached: Callable[[], bool], process: Launched, folder: Path, delay: float = 0.0) -> None:
    """Kill all processes of a run, `delay` seconds after it has `reached` something."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, folder.with_suffix('.log').read_text()[-3000:]
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def assert_same_result(found: Path, expected: Path) -> None:
    """Bit for bit."""
    assert losses(found) == losses(expected)
    adapter = Path('adapter/adapter_model.safetensors')
    one, other = (load_file(folder / adapter) if (folder / adapter).is_file() else weights(folder)
                  for folder in (found, expected))
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.dist
@pytest.mark.parametrize(('stage', 'extra'), [
    ('stage1', [*SHARDED, 'lora.lora_dropout=0.1']), ('stage2', []), ('stage2', ['fsdp.state_dict_type=full'])])
def test_killed_and_resumed_equals_undisturbed(
    stage: str, extra: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe, args = f'train_{stage}', adamw(request.getfixturevalue(f'{stage}_args'), 40, *extra)
    run(recipe, tmp_path / 'whole', args, 2)
    kill_when(lambda: max(losses(tmp_path / 'killed'), default=-1) >= 12,
              start(recipe, tmp_path / 'killed', args, 2), tmp_path / 'killed')
    assert max(losses(tmp_path / 'killed')) < 39, 'the run was killed too late'
    run(recipe, tmp_path / 'killed', args, 2)
    assert_same_result(tmp_path / 'killed', tmp_path / 'whole')


@pytest.mark.dist
def test_other_numbers_of_ranks_go_on(stage2_args: list[str], tmp_path: Path) -> None:
    """2 → 1 → 2 ranks."""
    args = [*stage2_args, *SGD, 'optimizer.momentum=0.9', 'max_duration=30ba', 'fsdp.state_dict_type=sharded']
    run('train_stage2', tmp_path / 'whole', args, 2)
    for ranks, steps in ((2, 10), (1, 20), (2, 30)):
        run('train_stage2', tmp_path / 'elastic', [*args, f'max_duration={steps}ba'], ranks)
    found, expected = losses(tmp_path / 'elastic'), losses(tmp_path / 'whole')
    assert sorted(found) == sorted(expected) == list(range(30))
    for step, value in expected.items():
        assert found[step] == pytest.approx(value, rel=1e-5), step


def unfinished(checkpoints: Path) -> list[str]:
    """The checkpoints that are being written."""
    there = [path for path in checkpoints.glob('ep*-ba*') if not path.is_symlink()]
    return [path.name for path in there
            if not (path / '.metadata' if path.is_dir() else path).exists()
            or path.is_file() and not zipfile.is_zipfile(path)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('stage', 'extra'), [
    ('stage1', ['lora.lora_dropout=0.1']), ('stage1', [*SHARDED, 'lora.lora_dropout=0.1']),
    ('stage1', ['fsdp.state_dict_type=full', 'lora.lora_dropout=0.1']),
    ('stage2', []), ('stage2', ['fsdp.state_dict_type=sharded']), ('stage2', ['fsdp.state_dict_type=full'])])
def test_twenty_kills(stage: str, extra: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """While training, evaluating and writing a checkpoint, each at random moments."""
    generator = random.Random(str((stage, extra)))
    args = request.getfixturevalue(f'{stage}_args')
    if stage == 'stage1':
        data = next(value for value in args if value.startswith('train_data.streams.s.local='))
        args = [*args, data.replace('train_data', 'eval_data'), 'eval_data.num_canonical_nodes=4',
                'eval_data.num_workers=0']
    recipe, args = f'train_{stage}', adamw(args, STEPS, f'save_interval={SAVE}ba', f'eval_interval={EVAL}ba', *extra)
    run(recipe, tmp_path / 'whole', args, 2)
    folder = tmp_path / 'killed'
    hit = dict.fromkeys(('training', 'evaluating', 'writing'), 0)
    for kill in range(20):
        process, aim = start(recipe, folder, args, 2), list(hit)[kill % 3]
        begun = max(losses(folder), default=-1)
        size = folder.with_name('killed.log').stat().st_size
        target = begun + generator.randint(1, 8)

        def reached(aim: str = aim, target: int = target, size: int = size) -> bool:
            step = max(losses(folder), default=-1)
            if aim == 'evaluating':
                return step >= target and (step + 1) % EVAL == 0
            if aim == 'writing':
                return step >= target and bool(unfinished(folder / 'checkpoints'))
            return step >= target

        kill_when(reached, process, folder, generator.uniform(0, 0.05) if aim != 'writing' else 0)
        step = max(losses(folder))
        evaluated = max(read_metrics(folder / 'metrics.jsonl').get('loss/eval/total', {}), default=-1)
        if unfinished(folder / 'checkpoints'):
            hit['writing'] += 1
        elif (step + 1) % EVAL == 0 and evaluated < step:
            hit['evaluating'] += 1
        else:
            hit['training'] += 1
        print(f'kill {kill + 1}: step {step}, {hit}', flush=True)
    run(recipe, folder, args, 2)
    assert_same_result(folder, tmp_path / 'whole')
    assert all(hit.values()), hit
