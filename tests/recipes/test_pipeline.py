# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A pipeline is checked before it starts, resumes after a kill at any step, and ends at a signal as its steps do."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from launched import ROOT, Launched, alive, assert_same_weights, contents, finish, losses, wait_until, weights
from recipes_in_process import run_recipe

from llm2clip import pipeline
from llm2clip.config import PipelineConfig
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.pipeline import Step, load_steps, run_steps

PARTS = ('stage1', 'embeddings', 'stage2', 'evaluate')  # folders of the steps
# What differs between two undisturbed runs: times, logs and checkpoints, whose losses and weights are compared.
DIFFERS = r'(^|/)(seconds\.json|metrics\.jsonl|checkpoints/.*|config\.yaml|\..*)$'


@pytest.fixture
def file(stage1_args: list[str], stage2_args: list[str], image_dataset: Path, tmp_path: Path) -> Path:
    """Three steps in the folder of the name `folder`."""
    embeddings = '${folder}/embeddings/s'
    text_side = [f'{data}.streams.s.embeddings.tiny.local={embeddings}' for data in ('train_data', 'eval_data')]
    steps = {
        'stage1': ['train_stage1', *stage1_args, 'max_duration=${first}', 'save_folder=${folder}/stage1'],
        'embeddings': ['extract_embeddings', 'teacher=${folder}/stage1/teacher', f'datasets.s.local={image_dataset}',
                       'out=${folder}/embeddings', 'device=cpu', '${extra}'],
        'stage2': ['train_stage2', *stage2_args, *text_side, 'max_duration=${duration}',
                   'save_folder=${folder}/stage2'],
        'evaluate': ['evaluate', 'models.m={run: ${folder}/stage2, teacher: ${folder}/stage1/teacher}',
                     f'retrieval.s.local={image_dataset}', 'out=${folder}/evaluate', 'device=cpu'],
    }
    path = tmp_path / 'pipeline.yaml'
    path.write_text(json.dumps({'folder': '???', 'first': '4ba', 'duration': '4ba', 'extra': '', 'steps': steps,
                                'end': 'results: ${folder}'}))
    return path


def _start(*args: object) -> Launched:
    return Launched([str(ROOT / 'recipes/run.py'), *map(str, args)], Path(f'{args[1]}.log'.removeprefix('folder=')))


def _finish(*args: object, ok: bool = True) -> str:
    log = Path(f'{args[1]}.log'.removeprefix('folder='))
    log.unlink(missing_ok=True)
    return finish(_start(*args), log, ok)


def _assert_same(found: Path, expected: Path) -> None:
    for stage in ('stage1', 'stage2'):
        assert losses(found / stage) == losses(expected / stage)
    assert_same_weights(weights(found / 'stage2'), weights(expected / 'stage2'))
    assert contents(found, DIFFERS) == contents(expected, DIFFERS)


@pytest.mark.timeout(600)
def test_killed_at_every_step_and_resumed_equals_undisturbed(file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    output = _finish(file, f'folder={whole}')
    assert [int(n) for n in re.findall(r'took \d+ s, (\d) steps remain', output)] == [3, 2, 1, 0]
    assert output.rstrip().endswith(f'results: {whole}')
    for part in PARTS:
        process = _start(file, f'folder={killed}')
        wait_until((killed / part).exists, process, Path(f'{killed}.log'))
        process.kill()
    _finish(file, f'folder={killed}')
    _assert_same(killed, whole)

    # A finished step stays as it is; another setting is refused or repeated, as by the recipe alone.
    shutil.copytree(killed, tmp_path / 'before')
    assert f'[4/4] evaluate: {killed}/evaluate is complete' in _finish(file, f'folder={killed}')
    _assert_same(killed, tmp_path / 'before')
    output = _finish(file, f'folder={killed}', 'extra=storage=int8', ok=False)
    assert re.search(r'\nerror: .*storage', output) and '[3/4]' not in output
    assert f'this resumes: python {ROOT}/recipes/run.py {file} folder={killed} extra=storage=int8' in output
    output = _finish(file, f'folder={killed}', 'start=stage2', 'duration=6ba')
    assert max(losses(killed / 'stage2')) == 5 and '[1/2] stage2' in output


def test_a_step_is_skipped_only_if_nothing_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, '_MODULES', ())
    for folder in ('run/checkpoints', 'images'):
        Path(folder).mkdir(parents=True)
    weights_file, result = Path('run/checkpoints/weights'), Path('results/results.json')
    weights_file.write_text('1')
    calls: list[str] = []

    def evaluate(step: Step) -> int:
        calls.append(step.name)
        result.parent.mkdir(exist_ok=True)
        result.write_text(str(len(calls)))
        return int(Path('fails').exists())

    monkeypatch.setattr(pipeline, '_fork', evaluate)

    def repeats(*args: str) -> bool:
        before = len(calls)
        # Neither text is a path: one is too long, and the other would be the current folder.
        texts = [f'title={"x" * 300}', 'models.m.teacher={type: llm, pretrained: x, instruction: ""}']
        steps = ['evaluate', 'models.m.run=run', 'retrieval.r.local=images', 'out=results', *texts, *args]
        config = load_config(PipelineConfig, [f'steps={json.dumps({"a": steps})}'])
        with suppress(SystemExit):
            run_steps(config, load_steps(config))
        return len(calls) > before

    assert repeats() and not repeats()
    assert repeats('bootstrap=10') and not repeats('bootstrap=10') and repeats()
    changes: list[Callable[[], object]] = [
        lambda: weights_file.write_text('2'), lambda: os.utime(weights_file), weights_file.with_suffix('.new').touch,
        weights_file.unlink, lambda: Path('images/index.json').write_text('{}'), result.unlink,
        lambda: result.write_text('changed')]
    for change in changes:
        change()
        assert repeats() and not repeats()
    # What a failed step has written is not finished, even if everything is later as it was before.
    weights_file.write_text('3')
    time_of_weights = weights_file.stat().st_mtime_ns
    assert repeats()
    weights_file.write_text('4')
    Path('fails').touch()
    assert repeats()
    Path('fails').unlink()
    weights_file.write_text('3')
    os.utime(weights_file, ns=(time_of_weights, time_of_weights))
    assert repeats() and not repeats()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_then_the_run(number: signal.Signals, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    process = _start(file, f'folder={folder}', 'first=9000ba')
    log = Path(f'{folder}.log')
    wait_until(lambda: max(losses(folder / 'stage1'), default=0) > 1, process, log)
    runner, step = _children(process.pid)
    os.kill(runner, number)
    assert process.wait(timeout=120) == 128 + number
    assert log.read_text().count('\nstopped; the same command resumes') == 2  # of the step, and of the run
    assert not Path(f'/proc/{step}').exists() and 'Traceback' not in log.read_text()


# A module of the user, with which two ranks begin, before they import what takes long.
WAITS = """
import os, time
if os.environ.get('WORLD_SIZE') == '2':
    open(f'{os.path.dirname(__file__)}/rank{os.environ["RANK"]}', 'w').close()
    time.sleep(600)
"""
# Composer's launcher without the start of an interpreter, which would import Composer again.
LAUNCHES = """
import os, runpy, signal, sys

def execute(program, command):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name='__main__', alter_sys=True)

os.execv = execute
runpy.run_path('recipes/run.py', run_name='__main__')
"""


@pytest.mark.dist
def test_a_signal_ends_the_ranks_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    (tmp_path / 'waits.py').write_text(WAITS)
    folder, file = tmp_path / 'run', tmp_path / 'pipeline.yaml'
    step = ['extract_embeddings', 'teacher=t', 'datasets.d.local=d', 'out=${folder}']
    file.write_text(json.dumps({'folder': '???', 'steps': {'embeddings': step}}))
    (script := tmp_path / 'launches.py').write_text(LAUNCHES)
    log = tmp_path / 'run.log'
    process = Launched([str(script), str(file), f'folder={folder}', 'ranks=2', 'modules=[waits]'], log)
    wait_until(lambda: len([*tmp_path.glob('rank*')]) == 2, process, log)
    runner, launcher = _children(process.pid)
    assert len(Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split()) == 2
    os.kill(runner, signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert alive(process.pid) <= {process.pid}


def _children(pid: int) -> tuple[int, int]:
    """Process that runs the pipeline, and that of the step."""
    child, = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    step = Path(f'/proc/{child}/task/{child}/children').read_text().split()[-1]
    return int(child), int(step)


def test_commands_are_printed(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / 'recipes').symlink_to(ROOT / 'recipes')
    run_recipe(monkeypatch, 'run', str(file), f'folder={tmp_path}/a b', 'ranks=2', 'only=[stage2, embeddings]',
               'print=true')
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert re.findall(r"^composer -n 2 \S*recipes/(\w+)\.py '?\w+", output, re.M) == [
        'extract_embeddings', 'train_stage2']
    assert f"'out={tmp_path}/a b/embeddings'" in lines[0] and "''" not in lines[0]


def test_files_of_the_repository_are_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    step, *_ = load_steps(load_config(PipelineConfig, [str(ROOT / 'yamls/pipelines/quickstart.yaml')]))
    for path in (step.recipe, step.args[0]):
        assert Path(path).is_file()
    shutil.copytree(ROOT / 'yamls/quickstart', 'yamls/quickstart')
    step, *_ = load_steps(load_config(PipelineConfig, [str(ROOT / 'yamls/pipelines/quickstart.yaml')]))
    assert step.args == ['yamls/quickstart/steps.yaml']


@pytest.mark.parametrize(('line', 'key', 'message'), [
    ('folder: x\nsteps: {a: [prepare_dat, out=o]}', 'folder', 'unknown key'),  # no step refers to it
    ('steps: {a: [prepare_dat, out=o]}', 'steps.a', 'prepare_data'),
    ('steps: {a: [run, x.yaml]}', 'steps.a', 'unknown recipe'),
    ('steps: {a: [prepare_data, absent.yaml]}', 'steps.a', 'absent.yaml'),
    ('steps: {a: [prepare_data, source.name=emoji, out=o, outt=p]}', 'steps.a', 'outt'),
    ('steps: {a: [prepare_data, source.name=emojy, out=o]}', 'steps.a', 'emoji'),
    ("steps: {a: [prepare_data, 'out=${folder}']}", 'steps.a[1]', 'folder'),
    ("x: ${y}\ny: ${x}\nsteps: {a: [prepare_data, 'out=${x}']}", 'steps.a[1]', 'Recursive'),
    ("steps: {a: []}", 'steps.a', 'at least 1'),
    ('steps: {a: [prepare_data, source.name=emoji, out=o]}\nstart: b', 'start', "'b'"),
    ('steps: {a: [prepare_data, source.name=emoji, out=o]}\nonly: [b]', 'only', "'b'"),
])
def test_a_bad_pipeline_is_refused_by_file_and_step(line: str, key: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / 'bad.yaml'
    file.write_text(line)
    with pytest.raises(ConfigError, match=message) as error:
        load_steps(load_config(PipelineConfig, [str(file)]))
    assert error.value.key == key and error.value.place.startswith(f'{file}:')


def test_a_name_without_a_value_is_required(file: Path) -> None:
    with pytest.raises(ConfigError, match=f'folder .*{file}'):
        load_config(PipelineConfig, [str(file)])


def test_every_step_imports_the_modules_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.path', [*sys.path])
    Path('user_module.py').touch()
    steps = ['steps={a: [prepare_data, out=o, source.name=emoji], b: [report, results=r, out=o, steps.x=y]}']
    for step in load_steps(load_config(PipelineConfig, [*steps, 'modules=[user_module]'])):
        assert step.config.modules == ['user_module'] and "modules=['user_module']" in step.args
    assert sys.modules.pop('user_module').__file__ == f'{tmp_path}/user_module.py'
    with pytest.raises(ConfigError) as error:
        load_steps(load_config(PipelineConfig, [*steps, 'modules=[no_module]']))
    assert error.value.key == 'steps.a' and 'no_module' in str(error.value)
