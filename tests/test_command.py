# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Recipes read the configuration before heavy imports, print errors in one line, and end at Ctrl-C."""

import contextlib
import inspect
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Time, Timestamp
from launched import Launched, finish
from recipes_in_process import REQUIRED, SCHEMAS
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from wandb.errors import UsageError

from llm2clip import command
from llm2clip.command import lock_outputs, run_command
from llm2clip.config import ExportVisionConfig, PrepareConfig
from llm2clip.config.loading import load_config
from llm2clip.data.streams.verified_stream import ShardError
from llm2clip.errors import ConfigError
from llm2clip.io.folders import locked
from llm2clip.training.callbacks.monitors import ProgressBar

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _errors_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have them, unless a test sets the variable."""
    monkeypatch.delenv('LLM2CLIP_TRACEBACK', raising=False)


def _python(code: str, **options: Any) -> 'subprocess.Popen[str]':
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def test_keys_and_names_are_checked_without_heavy_imports() -> None:
    calls = []
    for recipe in SCHEMAS:
        key = REQUIRED[recipe][0].partition('=')[0]
        calls += [[recipe, '-h'], [recipe, *REQUIRED[recipe], 'outt=x'], [recipe, *REQUIRED[recipe], f'{key}=']]
    calls += [['prepare_data', '--help', 'source.webdatset'],
              ['train_stage2', *REQUIRED['train_stage2'], 'callbacks.save_bst={}'],
              ['train_stage2', *REQUIRED['train_stage2'], 'optimizer.name=adam']]
    output, log = _python(f'''
        import contextlib, io, json, runpy, sys
        said = []
        for recipe, *args in {calls!r}:
            sys.argv = [recipe, *args]
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), 'utf-8')) as out:
                try:
                    runpy.run_path(f'recipes/{{recipe}}.py', run_name='__main__')
                except SystemExit as end:
                    print(end.code, flush=True)
            said.append(out.buffer.getvalue().decode())
        print(json.dumps([said, [name for name in ('torch', 'transformers', 'composer', 'streaming', 'numpy')
                                 if name in sys.modules]]))
        ''').communicate()
    said, heavy = json.loads(output or log)
    assert heavy == [] and log == ''
    for recipe, text, unknown, bad in zip(SCHEMAS, said[::3], said[1::3], said[2::3]):
        assert f'recipes/{recipe}.py' in text and ': str' in text
        assert unknown.startswith('error: outt (command line): unknown key')
        assert re.match(r"error: \w+ \(command line\): .*(''|None), expected|error: \w+ .*None", bad), bad
    assert any('caption_csv, coco' in text and '--help source.NAME' in text for text in said)
    nearest = {'source': 'webdataset', 'callbacks.save_bst': 'save_best', 'optimizer': 'adamw'}
    for error, (key, meant) in zip(said[-3:], nearest.items(), strict=True):
        assert f'{key}: ' in error and f"'{meant}'" in error


def _raises(error: BaseException) -> Any:
    def main(*args: Any) -> None:
        raise error
    return main


HINT = ' (LLM2CLIP_TRACEBACK=1 shows where)'
NOTED = OSError('No space left')
NOTED.add_note('while shard 1 was embedded')
PASSED_ON = ('Caught ShardError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
             '  File "x.py", line 1\nllm2clip.data.streams.verified_stream.ShardError: a: b is damaged\n')


@pytest.mark.parametrize(('error', 'line'), [
    (ConfigError('no', 'run'), 'run: no'), (ShardError('shard 3 is damaged'), f'shard 3 is damaged{HINT}'),
    (ShardError(PASSED_ON), f'a: b is damaged{HINT}'), (NOTED, f'No space left; while shard 1 was embedded{HINT}'),
    (ConfigError('caption \x1b[2J\x9b1m\r of\n日本 é'), 'caption �[2J�1m� of\n日本 é'),  # nothing for a terminal
    (RuntimeError('unable to allocate shared memory(shm) for file </torch_1>'), '/dev/shm: full'),
    (OSError(5, 'Input/output error', 'ep0-ba4.pt', None, '/run/latest'), f'/run/latest: Input/output error{HINT}'),
    (RuntimeError('[/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1'), 'another rank'),
    (UsageError('api_key not configured (no-tty)'), 'api_key not configured'),
])
def test_an_expected_error_becomes_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(ExportVisionConfig, _raises(error), ['run=r', 'out=o'])
    printed = str(end.value.code)  # which Python prints, and ends with the status 1
    assert printed == f'error: {line}' or isinstance(error, (RuntimeError, UsageError)) and line in printed
    monkeypatch.setenv('LLM2CLIP_TRACEBACK', '1')
    with pytest.raises(type(error)):
        run_command(ExportVisionConfig, _raises(error), ['run=r', 'out=o'])


@pytest.mark.parametrize('error', [
    ValueError('raised by a library'),
    RuntimeError('out of resource: shared memory, Required: 9, Hardware limit: 8')])  # of a GPU
def test_a_fault_of_a_program_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(ExportVisionConfig, _raises(error), ['run=r', 'out=o'])


class Deadly(Dataset):
    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line() -> None:
    def load(config: Any) -> None:
        list(DataLoader(Deadly(), sampler=[0], num_workers=1, multiprocessing_context='fork'))

    def convert(config: Any) -> None:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('fork')) as pool:
            pool.submit(Deadly().__getitem__, 0).result()

    for main in (load, convert):
        with pytest.raises(SystemExit, match='error: num_workers: '):
            run_command(ExportVisionConfig, main, ['run=r', 'out=o'])


def test_what_goes_wrong_while_keys_are_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for arg, message in (('nowhere.yaml', r'error: nowhere\.yaml: cannot be read'),
                         ('run=\udcff', r'error: run \(command line\): cannot be read \(.*surrogates')):
        with pytest.raises(SystemExit, match=message):
            run_command(ExportVisionConfig, _raises(RuntimeError()), [arg])
    monkeypatch.setattr('llm2clip.command.load_config', _raises(KeyboardInterrupt()))
    with pytest.raises(SystemExit, match='130'):
        run_command(ExportVisionConfig, _raises(RuntimeError()), ['run=r', 'out=o'])


def test_the_version_is_printed_with_those_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(PrepareConfig, _raises(RuntimeError()), ['--version'])
    printed = capsys.readouterr().out
    assert printed.startswith('llm2clip 0.') and re.search(r', torch 2\.\d.*, transformers \d', printed)
    assert printed.count('\n') == 1


def test_a_recipe_of_one_process_refuses_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    done: list[object] = []
    with pytest.raises(SystemExit, match='composer started 2 ranks, expected one process'):
        run_command(PrepareConfig, done.append, ['out=o', 'source.name=x'])
    assert not done


def test_a_log_file_has_a_state_of_a_progress_bar_per_ten_seconds(tmp_path: Path) -> None:
    """And none of a bar that takes less than a second."""
    log = _python(f'''
        import time
        from llm2clip.command import run_command
        from llm2clip.config import PrepareConfig

        def main(config):
            from tqdm import tqdm
            for options in dict(desc='short'), dict(desc='long', delay=0):
                for _ in tqdm(range(300), **options):
                    time.sleep(0.001)

        run_command(PrepareConfig, main, ['out={tmp_path}/out', 'source.name=emoji'])
        ''').communicate()[1]
    assert re.findall(r'(short|long): +(\d+)%', log) == [('long', '0'), ('long', '100')]


def test_a_log_file_of_a_training_has_metrics_in_lines_that_are_due(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The bar of a training draws at each metric.  The values of an evaluation are a whole line."""
    monkeypatch.setattr(tqdm, '__init__', partialmethod(tqdm.__init__, mininterval=10, delay=1))  # as recipes do
    bar: Any = ProgressBar()
    state: Any = SimpleNamespace(timestamp=Timestamp(), max_duration=Time.from_timestring('300ba'),
                                 dataloader_label='train', dataloader_len=300)
    bar.epoch_start(state, None)
    for step in range(300):
        time.sleep(0.001)
        state.timestamp = Timestamp(batch=step + 1)
        bar.log_metrics({'loss/train/total': 0.5})
        bar.batch_end(state, None)
    state.dataloader_label = 'val'
    bar.eval_start(state, None)
    bar.log_metrics({f'metrics/val/image_retrieval_recall@{k}': k / 20 for k in range(1, 11)})
    bar.eval_end(state, None)
    bar.close(state, None)
    log = capfd.readouterr().err
    values = ', '.join(f'image_retrieval_recall@{k} {k / 20:.4f}' for k in range(1, 11))
    assert f'\nval: {values}\n' in log and '\x1b' not in log
    shown = re.findall(r'train +(\d+)%', log)
    assert shown[0] == '0' and set(shown[1:]) == {'100'} and 'loss/train/total=0.5' in log


def test_recipes_import_timm_without_wandb(tmp_path: Path) -> None:
    (script := tmp_path / 'script.py').write_text(
        "import sys, warm\nprint('timm' in sys.modules, warm.RECIPES_IMPORT_WANDB)")
    log = tmp_path / 'log'
    assert finish(Launched([str(script)], log), log) == 'True False\n'


STOPPED = '''
    import multiprocessing, os, time
    from tqdm import tqdm
    from llm2clip.command import run_command
    from llm2clip.config import PrepareConfig

    def main(config):
        os.makedirs({folder!r} + '/train')
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        worker.start()
        try:
            for i in tqdm(range(100)):
                print(worker.pid, flush=True)
                time.sleep(60)
        finally:
            worker.join()  # as libraries wait for their workers
            raise RuntimeError('and miss them')

    run_command(PrepareConfig, main, ['out={folder}', 'source.name=emoji'])
    '''


@pytest.mark.parametrize(('number', 'rank', 'status'), [
    (signal.SIGINT, 0, 130), (signal.SIGTERM, 0, 143), (signal.SIGINT, 1, -signal.SIGTERM)])
def test_a_signal_ends_a_recipe_and_its_workers(number: signal.Signals, rank: int, status: int, tmp_path: Path) -> None:
    folder = tmp_path / 'out'
    env = {**os.environ, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
    process = _python(STOPPED.format(folder=str(folder)), env=env, start_new_session=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    os.killpg(process.pid, number)  # as a terminal sends it: to both
    log = process.communicate(timeout=120)[1]
    assert process.returncode == status
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    last = 'stopped; the same command resumes with what is missing'
    assert log.endswith(f'\n{last}\n') is (rank == 0) and 'Traceback' not in log, log
    assert (folder / 'seconds.json').exists() is (rank == 0)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_destructor_does_not_swallow_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    process = _python(f'''
        import os, time
        from llm2clip.command import run_command
        from llm2clip.config import PrepareConfig

        class Resource:
            def __del__(self):
                os.kill(os.getpid(), {int(number)})
                time.sleep(0.1)  # where the handler raises the exit

        def main(config):
            resource = Resource()
            del resource
            time.sleep(60)

        run_command(PrepareConfig, main, ['out={tmp_path}/out', 'source.name=emoji'])
        ''')
    log = process.communicate(timeout=50)[1]
    assert process.returncode == 128 + number
    assert log.count('stopped; ') == 1 and 'Traceback' not in log, log


def test_a_duration_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / 'seconds.json').mkdir()
    config: Any = SimpleNamespace(output_folder=str(tmp_path), records_duration=True)
    (tmp_path / 'result').touch()
    with pytest.warns(UserWarning, match='seconds.json'), command._timed(config):
        pass


def test_a_stopped_plan_mentions_no_checkpoint() -> None:
    log = _python(f'''
        import os, signal
        from llm2clip.command import run_command
        from llm2clip.config import Stage2Config

        run_command(Stage2Config, lambda config: os.kill(os.getpid(), signal.SIGINT),
                    {[*REQUIRED['train_stage2'], 'plan=true']})
        ''').communicate()[1]
    assert log.endswith(' -> a plan\n\nstopped\n')


SPAWNS = '''
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from llm2clip.command import run_command
from llm2clip.config import PrepareConfig

def main(config):
    spawn = multiprocessing.get_context('spawn')
    manager, pool = spawn.Manager(), ProcessPoolExecutor(1, mp_context=spawn)
    print(pool.submit(len, 'uploaded').result(), flush=True)
    time.sleep(60)

if __name__ == '__main__':
    run_command(PrepareConfig, main)
'''


def test_spawned_processes_end_with_a_killed_recipe(tmp_path: Path) -> None:
    """Composer uploads checkpoints in such processes."""
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(SPAWNS)
    process = subprocess.Popen([sys.executable, recipe, f'out={tmp_path}/out', 'source.name=emoji'],
                               stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b'8\n'
    process.kill()
    try:
        process.communicate(timeout=120)  # until the last process has closed it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _call(recipe: str, *args: str) -> None:
    def main(config: Any) -> None:
        Path(config.output_folder).mkdir(exist_ok=True)
        Path(config.output_folder, 'made').touch()
    main.__code__ = main.__code__.replace(co_filename=f'recipes/{recipe}.py')
    run_command(SCHEMAS[recipe], main, args)


def _writes(recipe: str, folder: Path) -> list[str]:
    return [f'{arg.partition("=")[0]}={folder}' if arg in ('out=o', 'save_folder=f', 'index=o') else arg
            for arg in REQUIRED[recipe]]


@pytest.mark.parametrize('recipe', ['train_stage2', 'search', 'export_vision'])
def test_an_output_has_one_writer(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLM2CLIP_TRACEBACK', '1')
    monkeypatch.setattr(inspect.unwrap(locked), '__defaults__', (0,))
    args = _writes(recipe, tmp_path / 'out')
    expected = pytest.raises(ConfigError, match=f'{tmp_path}/out: another process is writing there')
    with lock_outputs(load_config(SCHEMAS[recipe], args), recipe), expected:
        _call(recipe, *args)
    _call(recipe, *args)
    _call(recipe, *args)


@pytest.mark.parametrize('recipe', ['train_stage2', 'report', 'search'])
def test_folders_of_others_are_refused(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLM2CLIP_TRACEBACK', '1')
    (tmp_path / 'home').mkdir()
    name = 'report.html' if recipe == 'report' else 'photo.jpg'
    (tmp_path / 'home' / name).write_text('mine')
    with pytest.raises(ConfigError, match=f'home: holds {name}, which {recipe} did not write'):
        _call(recipe, *_writes(recipe, tmp_path / 'home'))
    assert [path.name for path in (tmp_path / 'home').iterdir()] == [name]
    _call('evaluate', *_writes('evaluate', tmp_path / 'run'))
    with pytest.raises(ConfigError, match='run: was written by evaluate'):
        _call(recipe, *_writes(recipe, tmp_path / 'run'))


def test_machines_share_a_folder_that_workers_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.unwrap(locked), '__defaults__', (0,))
    first, second = (PrepareConfig(out=f'{tmp_path}/out', shard_index=i, num_shards=2) for i in range(2))
    with lock_outputs(first, 'prepare_data'):
        (tmp_path / 'out/train').mkdir()
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        worker.start()
        lock_outputs(second, 'prepare_data').close()
        with pytest.raises(ConfigError, match='another process is writing'):
            lock_outputs(first, 'prepare_data')
    lock_outputs(first, 'prepare_data').close()
    worker.kill()
    worker.join()


def test_the_commit_is_that_of_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a', *words], check=True)

    find = command.source_commit.__wrapped__
    (module := tmp_path / 'package/command.py').parent.mkdir()
    module.write_text('')
    monkeypatch.setattr(command, '__file__', str(module))
    assert find() is None
    git('init', '-q')
    git('add', '.')
    git('commit', '-qm', 'first')
    commit = find()
    assert commit is not None and re.fullmatch('[0-9a-f]{7}', commit)
    module.write_text('changed')
    assert find() == f'{commit}-dirty'
    monkeypatch.setenv('PATH', '')
    assert find() is None
