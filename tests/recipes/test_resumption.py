# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a run that is stopped and started again says and leaves behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from composer.utils import dist
from launched import SGD, Launched, alive, finish, losses, may_have_own_memory, run, wait_until
from parts import make_samples, write_dataset, write_text_embeddings
from recipes_in_process import run_recipe
from refusals import refused_at
from streaming import StreamingDataset

from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.tensors import read_safetensors
from llm2clip.training.callbacks.jsonl_logger import read_metrics


@pytest.mark.parametrize('kind', ['full', 'sharded'])
def test_a_resumed_run_keeps_checkpoints_and_metrics(
    kind: str, stage2_args: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str]
) -> None:
    folder, images, vectors = (tmp_path / name for name in ('run', 'images', 'vectors'))
    args = [*stage2_args, 'save_interval=1ba', f'save_folder={folder}', 'train_data.num_workers=0', 'progress_bar=true',
            f'train_data.streams.s.local={images}/train', f'train_data.streams.s.embeddings.tiny.local={vectors}']
    args.append('fsdp.state_dict_type=sharded' if kind == 'sharded' else 'loggers.wandb={project: p}')
    monkeypatch.setenv('WANDB_MODE', 'offline')

    def write(samples: int) -> None:
        for dataset in (images, vectors):
            shutil.rmtree(dataset, ignore_errors=True)
        write_dataset(make_samples(samples), images)
        write_text_embeddings(images / 'train', vectors, teacher_folder)

    def run(steps: int) -> str:
        run_recipe(monkeypatch, 'train_stage2', *args, f'max_duration={steps}ba')
        output = capfd.readouterr()
        assert re.search('ba/s, (loss/train|metrics/eval)/', output.err) or 'complete' in output.out
        return output.out

    suffix, metrics = '' if kind == 'sharded' else '-rank0.pt', folder / 'metrics.jsonl'
    write(64)
    assert 'resumes from' not in run(4)
    with pytest.raises(ConfigError, match='train_data.streams.s.local is'):  # before the dataset is opened
        run_recipe(monkeypatch, 'train_stage2', *args, 'train_data.streams.s.local=elsewhere', 'max_duration=7ba')
    capfd.readouterr()
    # As after a kill in the step after the checkpoint.
    with metrics.open('a') as file:
        file.write('{"step": 5, "loss/train/total": 99.0}\n{"step": 6, "lo')
    assert f'resumes from batch 4 (max_duration: 7ba), {folder}/checkpoints/ep0-ba4{suffix}\n' in run(7)
    checkpoints = sorted(path.name for path in (folder / 'checkpoints').glob('ep*'))
    assert checkpoints == [f'ep0-ba6{suffix}', f'ep0-ba7{suffix}']
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line['step'] for line in lines] == list(range(8))
    found = read_metrics(metrics)
    assert sorted(found['loss/train/total']) == list(range(7)) and 99.0 not in found['loss/train/total'].values()
    assert sorted(found['logit_scale']) == sorted(found['weight_norm']) == list(range(7))
    assert sorted(found['metrics/eval/retrieval_recall@10']) == [3, 4, 6, 7]
    settings = (folder / 'config.yaml').read_text()
    assert f'complete at batch 7 (max_duration: 5ba), {folder}/checkpoints/ep0-ba7{suffix}\n' in run(5)
    assert read_metrics(metrics) == found
    assert (folder / 'config.yaml').read_text() == settings and 'max_duration: 7ba' in settings
    if kind == 'full':
        ids = [path.name.split('-')[3] for path in (folder / 'wandb').glob('offline-run-*')]
        assert len(ids) > 1 and len({*ids}) == 1
        write(56)
        with pytest.raises(ConfigError, match='the data have changed since the checkpoint was written'):
            run(9)


def test_a_run_that_is_stopped_in_its_last_evaluation_is_evaluated(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the metrics are known, and before the best weights are written."""
    args = [*stage2_args, 'callbacks.save_best={}', 'train_data.num_workers=0', 'eval_interval=100ba']

    def best(folder: Path) -> Any:
        metrics = read_metrics(folder / 'metrics.jsonl')
        return metrics['metrics/eval/retrieval_recall@10'], read_safetensors(folder / 'best.safetensors').metadata

    def stop(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={tmp_path}/whole')
    for place in ('llm2clip.models.model_with_metrics.ModelWithMetrics.eval_forward',
                  'llm2clip.training.callbacks.monitors.write_safetensors'):
        folder = tmp_path / place.rpartition('.')[2]
        with monkeypatch.context() as stopped, pytest.raises(ZeroDivisionError):
            stopped.setattr(place, stop)
            run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={folder}')
        assert (folder / 'checkpoints/ep0-ba6-rank0.pt').is_file() and not (folder / 'best.safetensors').exists()
        run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={folder}')
        assert best(folder) == best(tmp_path / 'whole')
    monkeypatch.setattr('composer.Trainer.eval', stop)  # which is not called again
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={folder}')


def test_a_callback_with_a_state_that_comes_later_is_named(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*stage2_args, 'fsdp.state_dict_type=sharded', 'train_data.num_workers=0', f'save_folder={tmp_path}/run']
    run_recipe(monkeypatch, 'train_stage2', *args, 'max_duration=2ba')
    args += ['callbacks={lr_monitor: {}, save_best: {}}', 'max_duration=4ba']
    with refused_at('callbacks.save_best'):
        run_recipe(monkeypatch, 'train_stage2', *args)


def test_a_sharded_checkpoint_of_another_version_is_refused(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*stage2_args, 'fsdp.state_dict_type=sharded', 'train_data.num_workers=0', f'save_folder={tmp_path}/run']
    with monkeypatch.context() as older:
        older.setattr(SafeDataset, 'state_dict', StreamingDataset.state_dict)
        run_recipe(monkeypatch, 'train_stage2', *args, 'max_duration=1ba')
    with refused_at('checkpoint_folder', r'lacks state\.dataset_state\.train\.data'):
        run_recipe(monkeypatch, 'train_stage2', *args, 'max_duration=2ba')


def test_a_run_resumes_at_the_end_of_an_epoch(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*stage2_args, *SGD, 'eval_data=null', 'save_interval=1ep', 'train_data.num_workers=2']
    run_recipe(monkeypatch, 'train_stage2', *args, 'max_duration=2ep', f'save_folder={tmp_path}/whole')
    for epochs in (1, 2):
        run_recipe(monkeypatch, 'train_stage2', *args, f'max_duration={epochs}ep', f'save_folder={tmp_path}/resumed')
    assert losses(tmp_path / 'resumed') == losses(tmp_path / 'whole')


def test_nodes_without_a_common_checkpoint_folder_do_not_train(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another node does not see the file that this one sees.
    monkeypatch.setattr(dist, 'all_gather_object', lambda seen: [seen, False] if seen is True else [seen])
    with refused_at('checkpoint_folder'):
        run_recipe(monkeypatch, 'train_stage2', *stage2_args, f'save_folder={tmp_path}/run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('stage', 'wrong', 'key'), [
    (1, 'lr_scale={vision: 1.0}', 'lr_scale'), (2, 'model.vision.checkpoint=/nowhere', 'checkpoint: /nowhere'),
    (2, 'initial_weights=/nowhere', 'initial_weights')])
def test_a_refused_first_start_leaves_nothing(
    stage: int, wrong: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    args = request.getfixturevalue(f'stage{stage}_args')
    (tmp_path / 'mounted').mkdir()
    for name in ('mounted', 'new'):
        with pytest.raises((ConfigError, FileError), match=key):
            run_recipe(monkeypatch, f'train_stage{stage}', *args, wrong, f'save_folder={tmp_path}/{name}')
    assert [path.name for path in tmp_path.rglob('*')] == ['mounted']


def test_a_teacher_is_that_of_the_settings_in_its_folder(
    stage1_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str, folder: str = 'run') -> str:
        run_recipe(monkeypatch, 'train_stage1', *stage1_args, 'train_data.num_workers=0', *args,
                   f'save_folder={tmp_path}/{folder}')
        return capfd.readouterr().out

    run('max_duration=4ba', folder='whole')
    teacher = tmp_path / 'run/teacher'
    assert f'wrote the teacher to {teacher}' in run('max_duration=2ba')
    short = (teacher / 'model.safetensors').read_bytes()
    # What decides nothing that is learned may be another.
    assert f'{teacher} is complete' in run(
        'max_duration=2ba', 'progress_bar=true', 'save_interval=1ba', 'run_name=again', 'callbacks.lr_monitor={}',
        'train_data.download_retry=2', 'plan_ranks=2')
    for changed, message in (
        ('optimizer.lr=0.01', 'optimizer.lr is 0.05, expected 0.01'),
        ('algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 1.0}',
         'algorithms.gradient_clipping is None, expected {'),
        ('train_data.streams.s.local=elsewhere', 'train_data.streams.s.local is .*, expected .elsewhere'),
    ):
        with refused_at('save_folder', message):
            run('max_duration=2ba', changed)
    with pytest.raises(ConfigError, match='is there already, but not of a run in'):
        run('max_duration=2ba', f'teacher_folder={teacher}', folder='other')
    metrics = (tmp_path / 'run/metrics.jsonl').read_bytes()
    with pytest.raises(ConfigError, match='has ended, and there is no checkpoint to resume from'):
        run('max_duration=4ba', f'checkpoint_folder={tmp_path}/lost')
    with refused_at('autoresume'):
        run('max_duration=4ba', 'autoresume=false')
    assert (teacher / 'model.safetensors').read_bytes() == short
    assert metrics and (tmp_path / 'run/metrics.jsonl').read_bytes() == metrics
    with monkeypatch.context() as killed, pytest.raises(ZeroDivisionError):
        killed.setattr('llm2clip.training.trainer.fit', lambda *_: 1 / 0)
        run('max_duration=4ba')
    assert not teacher.exists() and not (tmp_path / 'run/lora').exists()
    capfd.readouterr()
    output = run('max_duration=4ba')
    assert 'resumes from batch 2 (max_duration: 4ba)' in output and 'wrote the teacher' in output
    found, expected = ((tmp_path / name / 'teacher/model.safetensors').read_bytes() for name in ('run', 'whole'))
    assert found == expected != short
    assert 'is complete' in run('max_duration=4ba')


@pytest.mark.dist
@pytest.mark.parametrize('kind', ['full', 'sharded'])
@pytest.mark.skipif(not may_have_own_memory(), reason='mounts nothing')
def test_a_full_disk_is_named(stage2_args: list[str], tmp_path: Path, kind: str) -> None:
    log, disk = tmp_path / 'run.log', tmp_path / 'disk'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk], check=True)
    try:
        args = [*stage2_args, f'fsdp.state_dict_type={kind}', 'save_interval=1ba', 'eval_data=null',
                'save_num_checkpoints_to_keep=-1', f'checkpoint_folder={disk}/run', f'save_folder={tmp_path}/run']
        output = finish(Launched(['recipes/train_stage2.py', *args], log, 2), log, ok=False)
    finally:
        subprocess.run(['umount', '--lazy', disk], check=True)
    assert re.search(f'error: {disk}/run/ep.*: cannot be written .No space left on device', output)
    assert 'Traceback' not in output


@pytest.mark.skipif(not may_have_own_memory(), reason='mounts nothing')
def test_full_shared_memory_is_named(stage2_args: list[str], tmp_path: Path) -> None:
    script, log = tmp_path / 'small_memory.py', tmp_path / 'run.log'
    script.write_text("import runpy, subprocess\nsubprocess.run(['mount', '-o', 'remount,size=60k', '/dev/shm'])\n"
                      "runpy.run_path('recipes/train_stage2.py', run_name='__main__')")
    run = Launched([str(script), *stage2_args, f'save_folder={tmp_path}/run'], log, own=tmp_path)
    assert 'error: /dev/shm: ' in finish(run, log, ok=False)


DEADLY = """
import itertools, os, runpy, signal
from llm2clip.data.streams.safe_dataset import SafeDataset
read, samples = SafeDataset.get_item, itertools.count()

def read_or_die(dataset, index, retry=7):
    if next(samples) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(dataset, index, retry)

SafeDataset.get_item = read_or_die
runpy.run_path('recipes/train_stage2.py', run_name='__main__')
"""


def test_a_killed_loader_worker_ends_a_training_with_one_line(stage2_args: list[str], tmp_path: Path) -> None:
    script, log = tmp_path / 'deadly.py', tmp_path / 'run.log'
    script.write_text(DEADLY)
    args = [*stage2_args, 'train_data.num_workers=2', f'save_folder={tmp_path}/run']
    said = finish(Launched([str(script), *args], log), log, ok=False)
    assert said.count('error: num_workers: ') == 1 and 'Traceback' not in said, said
    assert 'wrote the model' in run('train_stage2', tmp_path / 'run', args)


@pytest.mark.dist
def test_ctrl_c_ends_both_ranks_with_one_line(stage2_args: list[str], tmp_path: Path) -> None:
    folder, log = tmp_path / 'run', tmp_path / 'run.log'
    args = [*stage2_args, 'max_duration=100000ba', 'eval_interval=100000ba', f'save_folder={folder}']
    process = Launched(['recipes/train_stage2.py', *args], log, 2)
    wait_until((folder / 'checkpoints/latest-rank0.pt').exists, process, log)
    for pid in alive(process.pid) - {process.pid}:  # as a terminal does: the ranks and their workers
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    assert process.wait(240) in (130, 143)
    said, hint = log.read_text(), f'the same command resumes from the newest checkpoint in {folder}/checkpoints'
    assert said.count(f'stopped; {hint}') == said.count('stopped') == 1, said
    assert 'Traceback' not in said
    deadline = time.monotonic() + 60
    while alive(process.pid):  # workers notice the end of their rank within seconds
        assert time.monotonic() < deadline, alive(process.pid)
        time.sleep(0.1)
