# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Both trainings as a user launches them: one rank and two, DDP and FSDP2, killed and resumed, with bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm2clip.callbacks.jsonl_logger import read_metrics
from llm2clip.data.schema import read_index
from llm2clip.runs import load_checkpoint_model, load_stage2

ROOT = Path(__file__).parents[2]
COMPOSER = Path(sys.executable).with_name('composer')

COMMON = ['global_train_batch_size=8', 'max_duration=6ba', 'progress_bar=false', 'save_interval=2ba', 'precision=fp32',
          'train_data.num_workers=1', 'train_data.num_canonical_nodes=4', 'run_name=test', 'device=cpu',
          'scheduler.name=constant', 'callbacks.nan_monitor={}']
# SGD with a clipped gradient: weights differ as soon as a gradient or its norm does.
SGD = ['optimizer.name=sgd', 'algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.5}']


@pytest.fixture
def stage1_args(image_dataset: Path, llm_folder: Path) -> list[str]:
    return [*COMMON, f'text_encoder.pretrained={llm_folder}', 'text_encoder.max_length=32', 'symmetric=true',
            f'train_data.streams.s.local={image_dataset}', 'lora.r=4', 'lora.lora_dropout=0.0', 'optimizer.lr=0.05']


@pytest.fixture
def stage2_args(image_dataset: Path, sidecar: Path) -> list[str]:
    streams = [f'{data}.streams.s.{key}={value}' for data in ('train_data', 'eval_data')
               for key, value in (('local', image_dataset), ('embeddings', sidecar))]
    return [*COMMON, *streams, 'model.vision.name=test_efficientnet', 'model.vision.image_size=32',
            'model.adapter.depth=1', 'model.embed_dim=16', 'optimizer.lr=0.05', 'eval_interval=3ba',
            'train_data.caption_mix={short: 0.5, long: 0.5}', 'eval_data.caption_mix={short: 1.0}',
            'eval_data.num_workers=0', 'global_eval_batch_size=8']


def start(recipe: str, folder: Path, args: list[str], ranks: int = 1, **env: str) -> 'subprocess.Popen[str]':
    log = open(folder.with_suffix('.log'), 'a')  # noqa: SIM115
    command = [str(COMPOSER), '-n', str(ranks), f'recipes/{recipe}.py', *args, f'save_folder={folder}']
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', **env})


def run(recipe: str, folder: Path, args: list[str], ranks: int = 1, ok: bool = True, **env: str) -> str:
    code = start(recipe, folder, args, ranks, **env).wait(timeout=240)
    output = folder.with_suffix('.log').read_text()
    assert (code == 0) is ok, output[-6000:]
    return output


def losses(folder: Path) -> dict[int, float]:
    return read_metrics(folder / 'metrics.jsonl')['loss/train/total']


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint_model(folder)


def assert_same_run(found: Path, expected: Path, rtol: float = 1e-5) -> None:
    assert losses(found).keys() == losses(expected).keys()
    assert losses(found) == pytest.approx(losses(expected), rel=rtol)
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.dist
@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
def test_two_ranks_learn_what_one_learns(stage: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    args = [*request.getfixturevalue(f'{stage}_args'), *SGD]
    variants: dict[str, tuple[int, list[str]]] = {
        'one': (1, []), 'ddp': (2, []), 'fsdp': (2, ['fsdp.state_dict_type=full'])}
    for name, (ranks, extra) in variants.items():
        run(f'train_{stage}', tmp_path / name, [*args, *extra], ranks)
    assert len(losses(tmp_path / 'one')) == 6
    assert len({round(v, 6) for v in losses(tmp_path / 'one').values()}) == 6
    for name in ('ddp', 'fsdp'):
        assert_same_run(tmp_path / name, tmp_path / 'one')
    if stage == 'stage1':
        teachers = [(tmp_path / name / 'teacher' / 'model.safetensors') for name in variants]
        one, *others = map(load_file, teachers)
        for other in others:
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    else:
        recalls = [read_metrics(tmp_path / name / 'metrics.jsonl')['metrics/eval/retrieval_recall@10']
                   for name in variants]
        assert recalls[1] == pytest.approx(recalls[0]) and recalls[2] == pytest.approx(recalls[0])


@pytest.mark.dist
@pytest.mark.parametrize(('stage', 'sharding'), [
    ('stage1', []), ('stage2', []), ('stage2', ['fsdp.state_dict_type=full'])])
def test_killed_and_resumed_equals_undisturbed(
    stage: str, sharding: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    args = [*request.getfixturevalue(f'{stage}_args'), 'optimizer.name=adamw', 'optimizer.lr=0.01',
            'max_duration=40ba', *sharding]
    if stage == 'stage1':
        args.append('lora.lora_dropout=0.1')
    run(f'train_{stage}', tmp_path / 'whole', args, 2)
    process = start(f'train_{stage}', tmp_path / 'killed', args, 2)
    metrics = tmp_path / 'killed' / 'metrics.jsonl'
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics).get('loss/train/total', {})) < 13 and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / 'killed.log').read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = max(losses(tmp_path / 'killed'))
    assert 12 <= reached < 39, f'killed at {reached}, which is not in the middle'
    run(f'train_{stage}', tmp_path / 'killed', args, 2)
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    expected, found = weights(tmp_path / 'whole'), weights(tmp_path / 'killed')
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.dist
def test_two_ranks_extract_what_one_extracts(
    image_dataset: Path, sidecar: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / 'out'
    command = [str(COMPOSER), '-n', '2', 'recipes/extract_embeddings.py', f'teacher={teacher_folder}', f'out={out}',
               f'datasets.train={image_dataset}', 'device=cpu']
    subprocess.run(command, cwd=ROOT, check=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert read_index(out / 'train') == read_index(sidecar)


def test_wandb_offline_and_what_a_run_leaves_behind(stage2_args: list[str], tmp_path: Path) -> None:
    args = [*stage2_args, 'max_duration=2ba', 'loggers.wandb={project: test}']
    run('train_stage2', tmp_path / 'run', args, WANDB_MODE='offline', WANDB_DIR=str(tmp_path))
    assert list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
    before = losses(tmp_path / 'run')
    run('train_stage2', tmp_path / 'run', args, WANDB_MODE='offline', WANDB_DIR=str(tmp_path))
    assert losses(tmp_path / 'run') == before
    # Killed while it wrote the next checkpoint:
    (tmp_path / 'run' / 'checkpoints' / 'ep0-ba4-rank0.pt').write_bytes(b'half')
    run('train_stage2', tmp_path / 'run', [*stage2_args, 'max_duration=4ba'])
    assert len(losses(tmp_path / 'run')) == 4 and load_checkpoint_model(tmp_path / 'run')


def test_bad_input_stops_before_training(stage2_args: list[str], tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (['train_data.streams.s.local=/nowhere'], r'no MDS dataset in /nowhere'),
        (['seeed=1'], r'seeed \(command line\): unknown key; did you mean seed\?'),
        (['device_train_microbatch_size=4'], r'would only see the negatives inside it'),
    ]
    for i, (extra, message) in enumerate(cases):
        output = run('train_stage2', tmp_path / str(i), [*stage2_args, *extra], ok=False)
        assert re.search(message, output), output[-2000:]


def test_checkpoint_of_another_model_is_refused(stage2_args: list[str], tmp_path: Path) -> None:
    run('train_stage2', tmp_path / 'run', [*stage2_args, 'max_duration=2ba'])
    model, config, record = load_stage2(tmp_path / 'run')
    assert record['llm_embed_dim'] == 32 and config.model.embed_dim == 16 and not model.training
    path = tmp_path / 'run' / 'config.yaml'
    path.write_text(path.read_text().replace('embed_dim: 16', 'embed_dim: 24'))
    with pytest.raises(ValueError, match='checkpoint of another model'):
        load_stage2(tmp_path / 'run')
    with pytest.raises(ValueError, match='no config.yaml'):
        load_stage2(tmp_path / 'empty')
