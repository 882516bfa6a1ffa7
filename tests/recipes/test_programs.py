# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmarks, ablations and baselines: they import, their settings load, and kept records are read."""

import importlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from recipes_in_process import ROOT, SCHEMAS

from llm2clip.config.loading import load_config
from recipes.ablations import run
from recipes.ablations.suite import Suite
from recipes.baselines import run as baselines
from recipes.benchmarks import measuring
from recipes.benchmarks.gpu import cases
from recipes.benchmarks.measuring import Record

SUITES: dict[str, Suite] = {name: importlib.import_module(f'recipes.ablations.{name}_suite').SUITE
                            for name in ('align', 'forgetting', 'photograph', 'stage1')}
MODULES = sorted('.'.join(path.relative_to(ROOT).with_suffix('').parts)
                 for folder in ('benchmarks', 'ablations', 'baselines')
                 for path in (ROOT / 'recipes' / folder).rglob('*.py'))


@pytest.mark.parametrize('module', MODULES)
def test_every_module_imports(module: str) -> None:
    if module == 'recipes.baselines.open_clip_model':
        pytest.importorskip('open_clip', reason='the dependency group baselines is not installed')
    importlib.import_module(module)


@pytest.mark.parametrize('name', SUITES)
def test_every_variant_is_a_configuration(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a suite would run loads, and no two trainings are the same."""
    for folder in ('recipes', 'yamls'):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    suite, lanes, trained = SUITES[name], SimpleQueue(), []
    steps = {step.command: step for variant in suite.variants.values() for step in variant.needs}
    lanes.put(Path())

    def stand_in(command: list[str], log: Path, **_: Any) -> None:
        made = steps.get(tuple(command[1:]))
        if command[1] != '-m':
            config: Any = load_config(SCHEMAS[Path(command[1]).stem], command[2:])
            if 'evaluate' in command[1]:
                found = {key: {'models': {'m': {}}} for key in config.retrieval}
                Path(config.out).mkdir(parents=True)
                Path(config.out, 'results.json').write_text(json.dumps({'retrieval': found, 'cra': {'cra': 50.0}}))
            elif made is None:
                trained.append(config)
                Path(config.save_folder).mkdir(parents=True)
        if made is not None:
            Path(made.file).parent.mkdir(parents=True, exist_ok=True)
            Path(made.file).touch() if 'results' not in made.file else None

    monkeypatch.setattr(run, 'watch', stand_in)
    record = Record(tmp_path / 'measured.json')
    for variant in suite.variants:
        run.train_and_measure(suite, record, lanes, (1, variant))
    rows = {row for name, variant in suite.variants.items() for row in (name, *variant.also)}
    assert record.results.keys() == rows and all(record.has(row, 1) for row in rows)
    assert {row for ablation in suite.ablations for row in ablation.variants} == rows
    for config in trained:
        config.save_folder = ''
    assert all(one != other for i, one in enumerate(trained) for other in trained[:i])


def test_variants_of_an_ablation_are_compared_with_the_first(tmp_path: Path) -> None:
    suite, record = SUITES['stage1'], Record(tmp_path / 'measured.json')
    for ablation in suite.ablations:
        for i, variant in enumerate(ablation.variants):
            for seed in range(3):
                record.add(variant, seed, {'test': 50.0 + seed * (1 - i)})
    table = run.table(suite, record)
    assert '| nothing | 51.0 ± 1.0 |  |\n| no gradient clipping | 50.0 ± 0.0 | in 2 of 3 seeds |' in table
    assert table.count('| Flickr8k | mean | worse than the first |') == 2


def test_a_record_says_which_runs_are_of_another_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(commit: str, *runs: tuple[str, int]) -> Any:
        monkeypatch.setattr(measuring, 'source_commit', lambda: commit)
        record = Record(tmp_path / 'measured.json')
        for name, seed in runs:
            assert not record.has(name, seed)
            record.add(name, seed, {'x': 1.0})
        return json.loads((tmp_path / 'measured.json').read_text())

    first = add('aaaaaaa', ('a', 0), ('b', 0))
    assert first['about'] == measuring.describe() | {'commit': 'aaaaaaa', 'seeds': [0]}
    assert first['runs'] == {'a': {'0': {'x': 1.0}}, 'b': {'0': {'x': 1.0}}}
    add('bbbbbbb', ('c', 1), ('a', 1))
    about = add('bbbbbbb', ('a', 2), ('c', 2))['about']
    assert about['commit'] == 'aaaaaaa' and about['seeds'] == [0, 1, 2]
    assert about['runs'] == {'a': {'commit': 'aaaaaaa and bbbbbbb'}, 'c': {'commit': 'bbbbbbb'}}


STEPS = """
import sys, time
while True:
    time.sleep(float(sys.argv[2]))
    with open(sys.argv[1], 'a') as file:
        file.write('step ')
"""


def test_paces_are_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = []
    kill = os.killpg

    def killpg(process: int, number: int) -> None:
        signals.append((process, number))
        kill(process, number)

    monkeypatch.setattr(os, 'killpg', killpg)

    def training(name: str, program: str, seconds: float) -> Any:
        progress = tmp_path / name
        command = [sys.executable, '-c', program, str(progress), str(seconds)]
        return command, partial(measuring.occurrences, progress, 'step')

    trainings = {'quick': training('quick', STEPS, 0.01), 'slow': training('slow', STEPS, 0.3)}
    paces = measuring.paces_in_turns(trainings, tmp_path / 'logs', warm_up=2, rounds=2, seconds=0.5)
    assert 0.2 < paces['slow']['seconds_per_step'] < 10
    assert 0 < paces['quick']['seconds_per_step'] < paces['slow']['seconds_per_step']
    assert paces['quick']['first_step'] > 0
    quick, slow = signals[0][0], signals[1][0]
    turns = [(quick, signal.SIGCONT), (quick, signal.SIGSTOP), (slow, signal.SIGCONT), (slow, signal.SIGSTOP)]
    assert signals[:10] == [(quick, signal.SIGSTOP), (slow, signal.SIGSTOP), *turns, *turns]
    finished = (tmp_path / 'quick').read_text()
    trainings['ends'] = training('ends', 'pass', 0)
    with pytest.raises(measuring.ProcessFailedError, match='ends.log'):
        measuring.paces_in_turns(trainings, tmp_path / 'logs', warm_up=2, rounds=2, seconds=0.5)
    assert (tmp_path / 'quick').read_text() != finished
    finished = (tmp_path / 'quick').read_text()
    time.sleep(0.1)
    assert (tmp_path / 'quick').read_text() == finished, 'it still runs'


def test_every_baseline_gets_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs before a training counts as its time; a program that converges earlier has fixed steps."""
    def paces(trainings: dict[str, Any], *_: Any, **__: Any) -> dict[str, dict[str, float]]:
        return {name: {'first_step': 10.0, 'seconds_per_step': 2.0} for name in trainings}

    monkeypatch.setattr(baselines, 'paces_in_turns', paces)
    monkeypatch.setattr(baselines, 'recorded_seconds', lambda path: 30.0)
    program = baselines.Program(lambda folder, steps: [str(steps)], ('steps', 'x'), lambda folder: {'score': 1.0})
    programs = {'p': program, 'after two': program._replace(before=('a', 'b')),
                'converged': program._replace(steps=110)}
    plan = baselines.plan_steps(programs, 5.0, tmp_path)
    assert plan['p'] == {'steps': 146, 'first_step': 10.0, 'seconds_per_step': 2.0}
    assert plan['after two']['steps'] == 116
    assert plan['converged'] == {'steps': 110}


def test_a_finished_baseline_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def stand_in(command: list[str], log: Path, *_: Any, **__: Any) -> dict[str, float]:
        trained.append(command)
        return {'seconds': 70.0, 'seconds_per_step': 1.0, 'peak_gib': 1.0}

    monkeypatch.setattr(baselines, 'watch', stand_in)
    program = baselines.Program(lambda folder, steps: [str(steps)], ('steps', 'x'), lambda folder: {'score': 1.0})
    planned = {'steps': 60, 'seconds_per_step': 2.0}
    expected = {'before': 0, 'peak_gib': 1.0, 'score': 1.0} | planned
    assert baselines.measure(program, planned, tmp_path / 'seed17') == expected
    assert baselines.measure(program, planned, tmp_path / 'seed17') == expected
    assert trained == [['60']]


@pytest.mark.parametrize('device', ['gpu', 'cpu'])
@pytest.mark.parametrize('name', cases.CASES)
def test_cases_of_the_benchmark_load(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load_config(cases.SCHEMAS[cases.CASES[name].kind], cases.arguments(name, device, Path('run')))
