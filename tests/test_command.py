# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How recipes begin and end: nothing heavy before the configuration, errors in one line, an end at Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from recipes_in_process import SCHEMAS

from llm2clip.command import run_command
from llm2clip.config import ConfigError, ExportVisionConfig
from llm2clip.config_files import load_config
from llm2clip.data.streams.verified_stream import ShardError

ROOT = Path(__file__).parents[1]
RECIPES = list(SCHEMAS)


def _python(code: str, **options: Any) -> 'subprocess.Popen[str]':
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def test_help_and_a_mistyped_key_are_answered_before_anything_heavy_is_imported() -> None:
    process = _python(f'''
        import contextlib, io, json, runpy, sys
        errors, helps = {{}}, {{}}
        for recipe in {RECIPES}:
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), 'utf-8')) as out:
                sys.argv = [recipe, '-h']
                runpy.run_path(f'recipes/{{recipe}}.py', run_name='__main__')
                helps[recipe] = out.buffer.getvalue().decode()
            sys.argv = [recipe, 'outt=x']
            try:
                runpy.run_path(f'recipes/{{recipe}}.py', run_name='__main__')
            except SystemExit as end:
                errors[recipe] = end.code
        print(json.dumps([errors, helps, [name for name in ('torch', 'transformers', 'composer', 'streaming', 'numpy')
                                   if name in sys.modules]]))
        ''')
    output, log = process.communicate()
    errors, helps, heavy = json.loads(output or log)
    assert heavy == []
    assert all(f'recipes/{recipe}.py' in text and ': str' in text for recipe, text in helps.items())
    assert len(errors) == len(RECIPES) == 11
    assert all(error.startswith('error: outt (command line): unknown key') for error in errors.values()), errors


def test_help_may_be_read_in_part() -> None:
    process = _python("""
        import runpy, sys
        sys.argv = ['recipes/report.py', '--help']
        runpy.run_path('recipes/report.py', run_name='__main__')
        """)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == ('', 0)


@pytest.mark.long
def test_transformers_knows_exported_models_after_this_package_was_imported_first(tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text('{"model_type": "llm2clip", "llm_embed_dim": 7}')
    process = _python(f'''
        import llm2clip, peft  # which imports transformers, and which this package needs whole
        from transformers import AutoConfig
        print(AutoConfig.from_pretrained({str(tmp_path)!r}).llm_embed_dim, llm2clip.LLM2CLIPConfig.model_type)
        ''')
    output, log = process.communicate()
    assert output == '7 llm2clip\n', log


def _fail(error: Exception) -> Any:
    def main(config: ExportVisionConfig) -> None:
        raise error
    return main


def _error(main: Any) -> str:
    with pytest.raises(SystemExit) as end:
        run_command(ExportVisionConfig, main, ['run=r', 'out=o'])
    assert isinstance(end.value.code, str)  # which Python prints, and ends with the status 1
    return end.value.code


def test_errors_of_the_user_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('LLM2CLIP_TRACEBACK', raising=False)
    assert _error(_fail(ConfigError('run: no'))) == 'error: run: no'
    hint = ' (LLM2CLIP_TRACEBACK=1 shows where)'
    assert _error(_fail(ShardError('shard 3 is damaged'))) == f'error: shard 3 is damaged{hint}'
    passed_on = 'Caught ShardError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n' \
                '  File "x.py", line 1\nllm2clip.data.streams.verified_stream.ShardError: a: b is damaged\n'
    assert _error(_fail(ShardError(passed_on))) == f'error: a: b is damaged{hint}'

    def of_this_project(config: ExportVisionConfig) -> None:
        load_config(ExportVisionConfig, ['nowhere.yaml'])

    assert _error(of_this_project).startswith('error: nowhere.yaml: cannot be read')
    monkeypatch.setenv('LLM2CLIP_TRACEBACK', '1')
    with pytest.raises(ConfigError, match='run: no'):
        run_command(ExportVisionConfig, _fail(ConfigError('run: no')), ['run=r', 'out=o'])


@pytest.mark.parametrize('error', [RuntimeError('shapes'), KeyError('x'), ValueError('raised by a library')])
def test_faults_of_a_program_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('LLM2CLIP_TRACEBACK', raising=False)
    with pytest.raises(type(error)):
        run_command(ExportVisionConfig, _fail(error), ['run=r', 'out=o'])


def test_another_rank_leaves_the_error_to_rank_0_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('LLM2CLIP_TRACEBACK', raising=False)
    before = signal.getsignal(signal.SIGTERM)
    waited: list[float] = []
    monkeypatch.setattr(time, 'sleep', waited.append)
    monkeypatch.setenv('LOCAL_RANK', '1')
    try:
        assert _error(_fail(ConfigError('run: no'))) == 'error: run: no' and waited == [5.0]
    finally:
        signal.signal(signal.SIGTERM, before)


STOPPED = '''
    import multiprocessing, os, time
    from tqdm import tqdm
    from llm2clip.command import run_command
    from llm2clip.config import PrepareConfig
    os.makedirs({folder!r})

    def main(config):
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        worker.start()
        try:
            for i in tqdm(range(100)):
                print(worker.pid, flush=True)
                time.sleep(60)
        finally:
            worker.join()  # as libraries wait for their workers
            raise RuntimeError('and miss them')

    run_command(PrepareConfig, main, ['out={folder}', 'source.name=x'])
    '''


@pytest.mark.parametrize(('number', 'rank', 'status'), [
    (signal.SIGINT, 0, 130), (signal.SIGTERM, 0, 143), (signal.SIGINT, 1, -signal.SIGTERM)])
def test_a_signal_ends_a_recipe_and_its_workers_with_one_line(
    number: signal.Signals, rank: int, status: int, tmp_path: Path
) -> None:
    folder = tmp_path / 'out'
    env = {**os.environ, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
    process = _python(STOPPED.format(folder=str(folder)), env=env, start_new_session=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    os.killpg(process.pid, number)  # as a terminal sends it: to both
    log = process.communicate(timeout=20)[1]
    assert process.returncode == status
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    last = 'stopped; the same command goes on with what is missing'
    assert (log.splitlines()[-1] == last) is (rank == 0) and 'Traceback' not in log, log
    assert (folder / 'seconds.json').exists() is (rank == 0)
