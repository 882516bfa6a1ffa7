# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Train and measure what the paper's claims need: run_all.py emoji|forgetting|photograph.

What is done is not done again; `measured.json` in the claims' folder says what that is, and is all that this needs.
"""

import importlib
import json
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from lanes import in_lanes, run
from record import Record
from suite import Step, Suite
from table import write_table

Job = tuple[int, str]
"""Seed and variant."""

MAKING: defaultdict[str, Lock] = defaultdict(Lock)
"""Two lanes that need a file wait for one of them to make it."""


def make(suite: Suite, step: Step, lane: Path) -> None:
    with MAKING[step.file]:
        if not Path(step.file).is_file():
            log = Path(suite.folder, f'made_{Path(step.file).parent.name}.txt')
            run(step.script, *step.arguments, log=log, lane=lane)


def train_and_measure(suite: Suite, record: Record, job: Job, lane: Path) -> None:
    seed, name = job
    variant = suite.variants[name]
    for step in variant.needs:
        make(suite, step, lane)
    folder = Path(suite.folder, name, f'seed{seed}')
    log = Path(suite.folder, f'{name}_seed{seed}.txt')
    train = [*suite.train, *variant.train, f'seed={seed}', f'train_data.shuffle_seed={seed}', f'save_folder={folder}']

    def evaluate(row: str, *more: str) -> Path:
        out = folder / f'evaluate_{row}'
        run('recipes/evaluate.py', suite.evaluate, f'out={out}', *(f'models.{row}.{argument}' for argument in (
            f'run={folder}', 'batch_tokens=1024', 'precision=${if_bf16:amp_bf16,fp32}', *variant.encoder, *more)),
            log=log, lane=lane)
        return out / 'results.json'

    if variant.results is not None:
        results = Path(variant.results)
    elif variant.clip_text_tower:
        out = folder / 'evaluate'
        run('recipes/claims/clip_text_tower.py', *train, '--', suite.evaluate, f'out={out}', log=log, lane=lane)
        results = out / 'results.json'
    else:
        run('recipes/train_stage2.py', *train, log=log, lane=lane)
        results = evaluate(name)
    for row, more in variant.also.items():
        record.add(row, seed, _retrieval(evaluate(row, *more)))
    record.add(name, seed, _retrieval(results))


def _retrieval(results: Path) -> Any:
    return json.loads(results.read_text())['retrieval']


def main(suite: Suite) -> None:
    subprocess.run(['make', suite.made_first], check=True)
    record = Record(Path(suite.folder, 'measured.json'))
    jobs = [(seed, name) for seed in suite.seeds for name in suite.variants if not record.has(name, seed)]
    try:
        in_lanes(Path(suite.folder, 'lanes'), jobs, partial(train_and_measure, suite, record))
    except RuntimeError as error:
        sys.exit(str(error))
    print(write_table(suite, {name: record.of(name) for name in suite.measured}))


if __name__ == '__main__':
    main(importlib.import_module(f'{sys.argv[1]}_claims').SUITE)
