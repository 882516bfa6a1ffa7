# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A run that is killed and resumed, at any moment and as often as you like, learns what an undisturbed one does."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from gradients import COPIES
from launched import (
    SGD,
    SHARDED,
    Launched,
    assert_same_weights,
    contents,
    finish,
    losses,
    run,
    stage2_arguments,
    wait_until,
    weights,
)
from recipes_in_process import run_recipe
from remotes import FaultyProxy, s3_environment, s3_remove, s3_server
from safetensors.torch import load_file
from set_files import write_images

STEPS, SAVE, EVAL = 160, 4, 6
PATIENCE = 900.0  # seconds; other work may take most of the machine


def adamw(args: list[str], steps: int, *extra: str) -> list[str]:
    return [*args, 'optimizer.name=adamw', 'optimizer.lr=0.01', f'max_duration={steps}ba', *extra]


def assert_same_result(found: Path, expected: Path) -> None:
    assert losses(found) == losses(expected)
    adapter = Path('lora/adapter_model.safetensors')
    one, other = (load_file(folder / adapter) if (folder / adapter).is_file() else weights(folder)
                  for folder in (found, expected))
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.dist
@pytest.mark.parametrize(('stage', 'extra'), [
    ('stage1', [*SHARDED, 'lora.lora_dropout=0.1']), ('stage2', ['eval_interval=4ba']),
    pytest.param('stage2', [f'fsdp={{state_dict_type: full, replicate: {COPIES}}}', 'optimizer.fused=true',
                            'eval_interval=4ba'], marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_undisturbed(
    stage: str, extra: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The run that is killed takes a while for each step and each file of a sharded checkpoint, and is killed while it
    writes such a checkpoint."""
    recipe = f'train_{stage}'
    args = adamw(request.getfixturevalue(f'{stage}_args'), 8, 'save_interval=3ba', *extra)
    run(recipe, tmp_path / 'whole', args, 2)
    folder, log, sharded = tmp_path / 'killed', tmp_path / 'killed.log', extra[:2] == SHARDED[:2]
    (slow := tmp_path / 'slow.py').write_text(SLOW.format(recipe=recipe))
    process = Launched([str(slow), *args, f'save_folder={folder}'], log, 2)
    wait_until(lambda: max(losses(folder), default=-1) >= 4 and (not sharded or is_writing(folder)), process, log)
    process.kill()
    assert max(losses(folder)) < 7, 'the run was killed too late'
    run(recipe, folder, args, 2)
    assert_same_result(folder, tmp_path / 'whole')


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_a_run_resumes_on_other_numbers_of_ranks(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 → 1 → 2 ranks, each time on another machine, which has nothing of the lost one but the bucket."""
    args = [*stage2_args, *SGD, 'optimizer.momentum=0.9', 'eval_data=null']
    run_recipe(monkeypatch, 'train_stage2', *args, 'max_duration=9ba', f'save_folder={tmp_path}/whole')
    args += ['fsdp.state_dict_type=sharded', 'checkpoint_folder=s3://bucket/run/checkpoints']
    (tmp_path / 'served/bucket').mkdir(parents=True)
    found: dict[int, float] = {}
    with s3_server(tmp_path / 'served') as port, TemporaryDirectory() as temporary:  # short, for names of sockets
        monkeypatch.setenv('TMPDIR', temporary)
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        for ranks, steps in ((2, 3), (1, 6), (2, 9)):
            run('train_stage2', tmp_path / f'to{steps}', [*args, f'max_duration={steps}ba'], ranks)
            assert [path.name for path in (tmp_path / 'served/bucket/run/checkpoints').glob(f'ep*-ba{steps}')]
            assert not [*Path(temporary).rglob('__1_*')]  # shards of the second rank
            before, found = found, {**found, **losses(tmp_path / f'to{steps}')}
            assert sorted(found) == list(range(steps)) and before.items() <= found.items()
        # Read back from the bucket, shards joined.
        assert_same_weights(weights(tmp_path / 'to9'), weights(tmp_path / 'whole'))
    assert found == pytest.approx(losses(tmp_path / 'whole'), rel=1e-5)


@pytest.mark.slow
def test_a_bucket_that_is_gone_ends_a_training_with_one_line(stage2_args: list[str], tmp_path: Path) -> None:
    bucket = tmp_path / 'served/bucket'
    bucket.mkdir(parents=True)
    args = [*stage2_args, 'save_interval=200ba', 'max_duration=9000ba', 'checkpoint_folder=s3://bucket/run',
            f'save_folder={tmp_path}/run']
    with s3_server(bucket.parent) as port:
        # Not `Launched`, which forks the processes that upload.
        process = subprocess.Popen([sys.executable, 'recipes/train_stage2.py', *args], stderr=subprocess.PIPE,
                                   env={**os.environ, **s3_environment(port), 'AWS_MAX_ATTEMPTS': '1'}, text=True)
        while process.poll() is None and not [*bucket.rglob('ep*')]:
            time.sleep(0.1)
    output = process.communicate(timeout=PATIENCE)[1]
    assert re.search('^error: .*s3://bucket/run', output, re.MULTILINE) and 'Traceback' not in output


def is_writing(run: Path) -> bool:
    """Whether the newest checkpoint of a run is not complete."""
    there = [path for path in (run / 'checkpoints').glob('ep*-ba*') if not path.is_symlink()]
    newest = max(there, key=lambda path: int(path.name.split('-ba')[1].split('-')[0]), default=run)
    return newest != run and not ((newest / '.metadata').exists() if newest.is_dir() else zipfile.is_zipfile(newest))


class Place(NamedTuple):
    """What a case reads, and the only folder that it writes to.

    The dataset `images` is also in s3://bucket/images, its embeddings are in s3://bucket/embeddings; `stage1` and
    `stage2` are arguments of trainings, and `made` holds a trained model (run) and photos.
    """

    out: Path
    images: Path
    teacher: Path
    stage1: list[str]
    stage2: list[str]
    made: Path


class Case(NamedTuple):
    """A recipe that is killed, and whether it uses a remote whose answers go wrong one time in ten."""

    name: str
    recipe: str
    kills: int
    args: Callable[[Place], list[str]]
    ranks: int = 1
    remote: bool = False


def _training(stage: str, *extra: str) -> Callable[[Place], list[str]]:
    def args(place: Place) -> list[str]:
        given = [f'save_folder={place.out}', f'save_interval={SAVE}ba', f'eval_interval={EVAL}ba', *extra]
        if stage == 'stage1':
            given += ['lora.lora_dropout=0.1', f'eval_data.streams.s.local={place.images}',
                      'eval_data.num_canonical_nodes=4', 'eval_data.num_workers=0']
        return adamw(getattr(place, stage), STEPS, *given)

    return args


def _remote_training(place: Place) -> list[str]:
    stream = 'train_data.streams.s'
    return [*_training('stage2', 'fsdp.state_dict_type=sharded')(place), f'{stream}.remote=s3://bucket/images',
            f'{stream}.local={place.out}/cache/images', f'{stream}.embeddings.tiny.remote=s3://bucket/embeddings',
            f'{stream}.embeddings.tiny.local={place.out}/cache/embeddings']


def _evaluation(place: Place) -> list[str]:
    benchmark = f'{{local: {place.images}, caption_keys: [short, long]}}'
    return [
        f'models.m.run={place.made}/run', f'models.n.run={place.made}/run', f'retrieval.a={benchmark}',
        f'cra.captions={place.images}', 'cra.caption_keys=[short, long]',
        f'cra.teachers.t={place.teacher}', f'out={place.out}', 'device=cpu', 'batch_size=8', 'bootstrap=200']


CASES = [
    Case('prepare_data to a remote', 'prepare_data', 8, lambda place: [
        'source.name=image_folder', f'source.images={place.made}/photos', f'source.captions={place.made}/captions.csv',
        f'out={place.out}', 'size_limit=8kb', 'out_remote=s3://bucket/out'], remote=True),
    Case('stage 1, sharded', 'train_stage1', 14, _training('stage1', *SHARDED), 2),
    Case('extract_embeddings from remote to remote', 'extract_embeddings', 12, lambda place: [
        f'teacher={place.teacher}', f'datasets.train.local={place.out}/cache', 'device=cpu', f'out={place.out}',
        'datasets.train.remote=s3://bucket/images', 'out_remote=s3://bucket/out', 'batch_tokens=256'], 2, remote=True),
    Case('stage 2', 'train_stage2', 14, _training('stage2'), 2),
    Case('stage 2 from a remote', 'train_stage2', 14, _remote_training, 2, remote=True),
    Case('evaluate', 'evaluate', 14, _evaluation, 2),
    Case('export_hf', 'export_hf', 10, lambda place: [
        f'run={place.made}/run', f'out={place.out}']),
]
# Takes long for each step, and for what torch writes to disk before a checkpoint counts as written.
SLOW = """
import os, runpy, time
from llm2clip.training.callbacks.monitors import StopAtNonfinite
end, fsync = StopAtNonfinite.batch_end, os.fsync
StopAtNonfinite.batch_end = lambda *args: (time.sleep(0.2), end(*args))
os.fsync = lambda file: (time.sleep(0.1), fsync(file))
runpy.run_path('recipes/{recipe}.py', run_name='__main__')
"""
# What may differ: times, the log of a training, its checkpoints (whose weights are compared), and what was downloaded;
# and what a kill leaves on the server of an upload, which nobody reads.
DIFFERS = r'^(seconds\.json|metrics\.jsonl|checkpoints/|cache/)|\.rclone_temp_put_'


@pytest.fixture(scope='module')
def made(image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('made')
    run('train_stage2', folder / 'run', [*stage2_arguments(image_dataset, embeddings), f'teacher={teacher_folder}'])
    write_images(folder / 'photos', [f'{i}.png' for i in range(48)])
    rows = [f'{i}.png,a picture\n{i}.png,picture {i}\n' for i in range(48)]
    (folder / 'captions.csv').write_text('image,caption\n' + ''.join(rows))
    return folder


@pytest.fixture
def remote(image_dataset: Path, embeddings: Path, tmp_path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A server of datasets, with a place for new ones: its port, and the environment in which its answers go wrong."""
    bucket = tmp_path / 'served/bucket'
    shutil.copytree(image_dataset, bucket / 'images')
    shutil.copytree(embeddings, bucket / 'embeddings')
    (bucket / 'out').mkdir()
    with s3_server(bucket.parent) as port:
        proxy = FaultyProxy(port, ['503', 'truncate', 'drop', 'delay'], delay=0.5)
        yield port, s3_environment(proxy.port)
        proxy.close()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name.replace(' ', '_'))
def test_kills_at_random_moments(
    case: Case, image_dataset: Path, teacher_folder: Path, stage1_args: list[str], stage2_args: list[str], made: Path,
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What is there in the end is what an undisturbed run leaves, bit for bit."""
    port, env = request.getfixturevalue('remote') if case.remote else (0, {})
    out, remote_out, log = tmp_path / 'out', tmp_path / 'served/bucket/out', tmp_path / 'out.log'
    place = Place(out, image_dataset, teacher_folder, stage1_args, stage2_args, made)
    generator = random.Random(case.name)

    def begin() -> Launched:
        return Launched([f'recipes/{case.recipe}.py', *case.args(place)], log, case.ranks, env)

    def clear() -> None:
        shutil.rmtree(out)
        if case.remote:
            s3_remove(port, 'bucket', 'out/')

    def check() -> None:
        if case.recipe.startswith('train'):
            assert_same_result(out, tmp_path / 'whole')
        for found, expected in ((out, 'whole'), (remote_out, 'whole_remote')):
            one, other = contents(found, DIFFERS), contents(tmp_path / expected, DIFFERS)
            assert one.keys() == other.keys() and not [name for name in one if one[name] != other[name]]

    begun = time.monotonic()
    finish(begin(), log, seconds=PATIENCE)
    seconds, kills = time.monotonic() - begun, 0
    shutil.copytree(out, tmp_path / 'whole')
    if case.remote:
        shutil.copytree(remote_out, tmp_path / 'whole_remote')
    clear()
    while kills < case.kills:
        process = begin()
        try:
            process.wait(generator.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
        else:
            # What the kills left was completed; the next run begins with nothing.
            finish(process, log, seconds=PATIENCE)
            check()
            clear()
            continue
        kills += 1
    finish(begin(), log, seconds=PATIENCE)
    check()
