# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every recipe is killed, and gets an error of the system, at each of its calls that change files.

`make test-faults` runs these tests.  Each stores its counts below runs/faults, and is skipped if they are there.
"""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import torch
from faults import ROWS, Call, Fault, WatchedRun, build
from launched import SHARDED, contents, run, stage1_arguments, stage2_arguments, weights
from official_parts import HF_CONFIG, hf_state
from parts import picture
from remotes import s3_environment, s3_remove, s3_server
from safetensors.torch import save_file
from set_files import write_images

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]
# Seconds that a run may take, which takes a few when nothing goes wrong.
PATIENCE = 120.0
STRUCTURAL = ('open', 'rename', 'renameat', 'renameat2', 'unlink', 'unlinkat', 'remove', 'rmdir', 'mkdir', 'mkdirat',
              'symlink', 'symlinkat', 'link', 'linkat', 'fsync')
CREATING = ('open', 'mkdir', 'mkdirat', 'symlink', 'symlinkat', 'link', 'linkat', 'fsync')
# Errors that calls get in turn, and the calls that can have each of them.
ERRORS = [(errno.EIO, STRUCTURAL), (errno.ENOSPC, CREATING), (errno.EDQUOT, CREATING),
          (errno.EACCES, [name for name in STRUCTURAL if name != 'fsync'])]
# Number of writes that are torn, and that get an error.
TORN, FAILED_WRITES = 50, 16
# What differs between two undisturbed runs: times, logs and checkpoints, whose losses and weights are compared.
DIFFERS = r'(^|/)(seconds\.json|metrics\.jsonl|checkpoints/.*|captions\.duckdb)$'

# What is renamed while it is written, or can be written again.
PASSING = re.compile(r'\.latest|/latest-|seconds\.json|config\.yaml|\.tmp/|/cache/')


class Inputs(NamedTuple):
    """Small data and models that the recipes read."""

    images: Path
    embeddings: Path
    teacher: Path
    llm: Path
    clip: Path
    files: Path  # photographs, tars, tables, and a run of stage 2 with its results and exports
    bucket: Path


class Case(NamedTuple):
    """A recipe and its arguments, given the inputs and the folder that it writes."""

    name: str
    recipe: str
    args: Callable[[Inputs, Path], list[str]]
    ranks: int = 1
    every: int = 1
    """Only every n-th call gets an error, in a training."""
    remote: bool = False


def _prepare(inputs: Inputs, out: Path) -> list[str]:
    return ['source.name=image_folder', f'source.images={inputs.files}/photos', 'num_workers=2', 'size_limit=8kb',
            f'source.captions={inputs.files}/captions.csv', 'source.holdout={val: 4}', f'out={out}/data']


def _prepare_tables(inputs: Inputs, out: Path) -> list[str]:
    return ['source.name=webdataset', f'source.files={inputs.files}/tars/*.tar', 'source.captions={raw: raw_caption}',
            f'source.tables={inputs.files}/table.csv', 'source.table_key=key', 'source.image_key=__key__',
            f'source.index={out}/index', f'out={out}/data']


def _stage1(*more: str) -> Callable[[Inputs, Path], list[str]]:
    def args(inputs: Inputs, out: Path) -> list[str]:
        return [*stage1_arguments(inputs.images, inputs.llm), 'max_duration=4ba', 'save_interval=2ba',
                f'save_folder={out}/run', *more]

    return args


def _stage2(*more: str) -> Callable[[Inputs, Path], list[str]]:
    def args(inputs: Inputs, out: Path) -> list[str]:
        return [*stage2_arguments(inputs.images, inputs.embeddings), 'max_duration=4ba', 'save_interval=2ba',
                'eval_interval=2ba', 'callbacks.save_best={metric: retrieval_recall@10}', f'save_folder={out}/run',
                f'teacher={inputs.teacher}', *more]

    return args


def _inheritance(inputs: Inputs, out: Path) -> list[str]:
    stream = f'{{local: {inputs.images}, embeddings: {{tiny: {{local: {inputs.embeddings}}}, ' \
             f'clip_text: {{local: {inputs.files}/targets/train}}}}}}'
    return [f'train_data.streams.s={stream}', 'train_data.num_workers=1', 'train_data.num_canonical_nodes=4',
            'global_train_batch_size=8', 'max_duration=4ba', 'save_interval=2ba', 'run_name=test', 'device=cpu',
            'precision=fp32', 'progress_bar=false', 'adapter.depth=1', 'optimizer={name: adamw, lr: 0.003}',
            f'teacher={inputs.teacher}', f'save_folder={out}/run']


def _evaluate(inputs: Inputs, out: Path) -> list[str]:
    return [f'models.m.run={inputs.files}/run', f'retrieval.a={{local: {inputs.images}, caption_keys: [short, long]}}',
            f'cra.captions={inputs.images}', 'cra.caption_keys=[short, long]', f'cra.teachers.t={inputs.teacher}',
            f'out={out}/results', 'device=cpu', 'batch_size=8', 'bootstrap=200', 'num_workers=1']


CASES = [
    Case('prepare_data', 'prepare_data', _prepare),
    Case('prepare_data, tables', 'prepare_data', _prepare_tables),
    Case('prepare_data, bucket', 'prepare_data',
         lambda inputs, out: [*_prepare(inputs, out), 'out_remote=s3://bucket/out'], remote=True),
    Case('train_stage1', 'train_stage1', _stage1(), every=2),
    Case('train_stage1, sharded', 'train_stage1', _stage1(*SHARDED), ranks=2, every=4),
    Case('extract_embeddings', 'extract_embeddings', lambda inputs, out: [
        f'teacher={inputs.teacher}', f'datasets.train.local={inputs.images}', 'device=cpu', f'out={out}/embeddings',
        'batch_tokens=256']),
    Case('extract_embeddings, bucket', 'extract_embeddings', lambda inputs, out: [
        f'teacher={inputs.teacher}', 'datasets.train.remote=s3://bucket/images', f'datasets.train.local={out}/cache',
        'device=cpu', f'out={out}/embeddings', 'batch_tokens=256', 'out_remote=s3://bucket/out'], remote=True),
    Case('extract_image_embeddings', 'extract_image_embeddings', lambda inputs, out: [
        'vision={name: test_efficientnet, pretrained: false, image_size: 32}', 'device=cpu',
        f'datasets.train.local={inputs.images}', f'out={out}/embeddings', 'num_workers=1']),
    Case('train_stage2', 'train_stage2', _stage2(), every=2),
    Case('train_stage2, bucket', 'train_stage2', _stage2('checkpoint_folder=s3://bucket/out/checkpoints'),
         remote=True),
    Case('train_inheritance', 'train_inheritance', _inheritance, every=2),
    Case('evaluate', 'evaluate', _evaluate),
    Case('export_hf', 'export_hf', lambda inputs, out: [f'run={inputs.files}/run', f'out={out}/export']),
    Case('export_vision', 'export_vision', lambda inputs, out: [f'run={inputs.files}/run', f'out={out}/export']),
    Case('export_sentence_transformers', 'export_sentence_transformers',
         lambda inputs, out: [f'teacher={inputs.teacher}', f'out={out}/export']),
    Case('import_official', 'import_official', lambda inputs, out: [
        f'checkpoint={inputs.files}/official', f'teacher={inputs.teacher}', f'out={out}/imported',
        'vision={name: a folder, image_size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}']),
    Case('report', 'report', lambda inputs, out: [
        f'results={inputs.files}/results', f'out={out}/report', f'steps.stage2={inputs.files}/run']),
    Case('search', 'search', lambda inputs, out: [
        f'model={inputs.files}/export/llm2clip', f'images={inputs.files}/photos', f'index={out}/index', 'num_workers=1',
        'query=a red square', 'device=cpu']),
]


@pytest.fixture(scope='module', autouse=True)
def _watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Load the library that makes calls fail into all processes that the tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LD_PRELOAD', str(build(tmp_path_factory.mktemp('library'))))
        yield


@pytest.fixture(scope='module')
def inputs(
    _watched: None, image_dataset: Path, embeddings: Path, teacher_folder: Path, llm_folder: Path, clip: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Inputs:
    import webdataset

    files = tmp_path_factory.mktemp('files')
    write_images(files / 'photos', [f'{i}.png' for i in range(16)])
    rows = [f'{i}.png,a picture\n{i}.png,picture {i}\n' for i in range(16)]
    (files / 'captions.csv').write_text('image,caption\n' + ''.join(rows))
    (files / 'tars').mkdir()
    for t in range(2):
        with webdataset.TarWriter(str(files / f'tars/{t:05}.tar')) as writer:
            for i in range(t * 4, t * 4 + 4):
                writer.write({'__key__': f'{i:09}', 'jpg': picture(i), 'json': {'key': f'{i:09}'}})
    rows = [f'{i:09},caption {i}\n' for i in range(8)]
    (files / 'table.csv').write_text('key,raw_caption\n' + ''.join(rows))
    (files / 'official').mkdir()
    save_file(hf_state(), files / 'official/model.safetensors')
    (files / 'official/config.json').write_text(json.dumps(HF_CONFIG))
    made = Inputs(image_dataset, embeddings, teacher_folder, llm_folder, clip, files, files / 'served/bucket')
    run('train_stage2', files / 'run', [*stage2_arguments(image_dataset, embeddings), f'teacher={teacher_folder}'])
    for recipe, args in (
        ('extract_embeddings', ['teacher.type=clip_text', f'teacher.name={clip}', f'out={files}/targets',
                                f'datasets.train.local={image_dataset}', 'device=cpu']),
        ('evaluate', [*_evaluate(made, files)]),
        ('export_hf', [f'run={files}/run', f'out={files}/export']),
    ):
        process = WatchedRun([f'recipes/{recipe}.py', *args], files / 'nothing', files)
        assert process.wait(PATIENCE) == 0, process.log.read_text()
    shutil.copytree(image_dataset, made.bucket / 'images')
    (made.bucket / 'out').mkdir()
    return made


class Place:
    """Folder that a case writes, with what an undisturbed run leaves there."""

    def __init__(self, case: Case, inputs: Inputs, work: Path, port: int) -> None:
        self.case = case
        self.out = work / 'out'
        self.work = work
        self.temporary = work / 'tmp'
        self.remote = inputs.bucket / 'out'
        self.port = port
        self.env = s3_environment(port) if case.remote else {}
        self.env['TMPDIR'] = str(self.temporary)
        self.command = [f'recipes/{case.recipe}.py', *case.args(inputs, self.out)]
        self.clear()
        whole = self.start()
        assert whole.wait(PATIENCE) == 0, whole.log.read_text()
        self.calls = whole.calls()
        self.expected = self.results()
        self.names = self.all_names()

    def clear(self) -> None:
        for folder in (self.out, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        if self.case.remote:
            s3_remove(self.port, 'bucket', 'out/')
        if 'PYTEST_XDIST_WORKER' in os.environ:  # which has shared memory of its own
            for segment in Path('/dev/shm').iterdir():
                segment.unlink()

    def start(self, fault: Optional[Fault] = None) -> WatchedRun:
        return WatchedRun(self.command, self.out, self.work, self.case.ranks, fault, self.env)

    def results(self) -> dict[str, Any]:
        """Return the contents of all files, and the weights and losses of a training."""
        found: dict[str, Any] = dict(contents(self.out, DIFFERS))
        if self.case.remote:
            found.update({f'bucket/{name}': data for name, data in contents(self.remote, DIFFERS).items()})
        if self.case.recipe.startswith('train') and not self.case.remote:
            found.update(weights(self.out / 'run'))
        return found

    def all_names(self) -> Counter[str]:
        """Return the paths of all files below the folder, without whole shards of a cache, which serve the next run.

        What is left in /tmp and /dev/shm is not counted.
        """
        names = [path.relative_to(self.out) for path in self.out.rglob('*')]
        return Counter(str(name) for name in names if name.parts[0] != 'cache' or name.suffix != '.mds')

    def faults(self, kind: str) -> list[Fault]:
        """Return where to put faults: kills at each call, torn writes in some, and errors at each in turn."""
        calls = _changes(self.calls)
        structural = [call for call in calls if call.name in STRUCTURAL]
        writes = [call for call in calls if call.name.startswith('write')]
        if kind == 'kill':
            return [Fault(call.number, kind) for call in structural]
        if kind == 'torn':
            return [Fault(call.number, kind) for call in writes[::-(-len(writes) // TORN)]]
        chosen = structural[::self.case.every] + writes[::-(-len(writes) // FAILED_WRITES)]
        faults: list[Fault] = []
        for call, (number, names) in zip(chosen, itertools.cycle(ERRORS)):
            if call.name not in names and call.name not in ('write', 'writev'):
                number = errno.EIO
            faults.append(Fault(call.number, str(number)))
        return faults


def _changes(calls: list[Call]) -> list[Call]:
    """Leave out the creation of folders that are there already, which changes nothing."""
    changes: list[Call] = []
    folders: set[Path] = set()
    for call in calls:
        if call.name.startswith('mkdir'):
            if call.path in folders:
                continue
            folders.add(call.path)
        elif call.name in ('rmdir', 'unlinkat'):
            folders.discard(call.path)
        elif call.name.startswith('rename'):
            folders.clear()
        changes.append(call)
    return changes


def _same(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    different = [*(expected.keys() - found.keys())]
    for name in expected.keys() & found.keys():
        value = expected[name]
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        if not same:
            different.append(name)
    return different


def _attempt(place: Place, fault: Fault) -> dict[str, str]:
    """Run with a fault, and then again without; return the column of the table -> what went wrong."""
    call = next(call for call in place.calls if call.number == fault.number)
    place.clear()
    problems: dict[str, str] = {}
    faulty = place.start(fault)
    try:
        code = faulty.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        code = -1
        problems['hangs'] = 'with the fault'
    said = faulty.log.read_text()
    if 'Traceback (most recent call last)' in said:
        problems['tracebacks'] = said[-1500:]
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    is_error = fault.kind not in ('kill', 'torn')
    if is_error and code > 0 and (len(errors) != 1 or not any(part in errors[0] for part in ('/', 's3://'))):
        problems.setdefault('tracebacks', f'no line that names a file: {said[-1500:]}')
    again = place.start()
    try:
        code = again.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        code = -1
        problems['hangs'] = 'of the repeat'
    said = again.log.read_text()
    if 'Traceback (most recent call last)' in said:
        problems['tracebacks'] = said[-1500:]
    if code != 0:
        problems['refusals'] = said[-1500:]
    else:
        different = _same(place.results(), place.expected)
        if different:
            problems['wrong results'] = ', '.join(different)
        extra = place.all_names() - place.names
        if extra:
            problems['leftovers'] = ', '.join(extra)
    return {column: f'{fault.kind} at {call.name} {call.path.relative_to(place.work)} (call {call.number}): {text}'
            for column, text in problems.items()}


@pytest.mark.parametrize('kind', ['kill', 'torn', 'error'])
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name.replace(', ', '-'))
def test_a_fault_at_any_call_loses_nothing(case: Case, kind: str, inputs: Inputs, tmp_path: Path) -> None:
    """The same command, given again, leaves what an undisturbed run leaves."""
    row = ROWS / f'{case.name.replace(", ", "-")}.{kind}.json'
    if row.is_file():
        pytest.skip(f'{row} has the counts')
    problems: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix='f') as work, s3_server(inputs.bucket.parent) as port:
        place = Place(case, inputs, Path(work), port)
        faults = place.faults(kind)
        for fault in faults:
            for column, text in _attempt(place, fault).items():
                problems.setdefault(column, []).append(text)
    row.parent.mkdir(parents=True, exist_ok=True)
    counts = {column: len(texts) for column, texts in problems.items()}
    if problems:
        row.with_suffix('.txt').write_text('\n\n'.join(
            f'{column}: {text}' for column, texts in problems.items() for text in texts))
    row.write_text(json.dumps({'case': case.name, 'kind': kind, 'positions': len(faults), **counts}))
    assert not counts, row.with_suffix('.txt')


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name.replace(', ', '-'))
def test_what_a_rename_publishes_is_on_the_disk(case: Case, inputs: Inputs, tmp_path: Path) -> None:
    """Files are flushed after their last write and before the rename, and the folder is after it."""
    with tempfile.TemporaryDirectory(prefix='f') as work, s3_server(inputs.bucket.parent) as port:
        calls = Place(case, inputs, Path(work), port).calls
    unflushed: dict[int, Path] = {}  # inode -> path, which safetensors changes by a call that is not seen
    not_durable: dict[Path, Call] = {}  # folder -> the last rename in it
    for call in calls:
        if call.name == 'write':
            unflushed[call.inode] = call.path
        elif call.name == 'fsync':
            unflushed.pop(call.inode, None)
            not_durable.pop(call.path, None)
        elif call.name.startswith(('unlink', 'remove')):
            unflushed = {inode: path for inode, path in unflushed.items() if path != call.path}
        elif call.name.startswith('rename') and not PASSING.search(str(call.path)):
            lost = [path for path in unflushed.values() if path.is_relative_to(call.old)]
            assert not lost, f'{call.path} is published before {lost} are flushed'
            not_durable[call.path.parent] = call
    assert not not_durable
