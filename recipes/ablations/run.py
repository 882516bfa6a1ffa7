# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Train and measure the variants of a suite: python -m recipes.ablations.run SUITE

`SUITE` is `align`, `forgetting`, `photograph` or `stage1`.  Its folder gets the results in `measured.json`
and the tables in `ablations.md`.  Variants and seeds that have results are skipped.
"""

import importlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import psutil

from recipes.ablations.suite import Suite
from recipes.benchmarks.measuring import ProcessFailedError, Record, markdown_table, watch

SEEDS = 0, 1, 2
LANES = 2
"""Concurrent trainings.  Two with one thread each are faster than one after the other with two threads."""
_MAKING: defaultdict[str, Lock] = defaultdict(Lock)


def train_and_measure(suite: Suite, record: Record, lanes: 'SimpleQueue[Path]', job: tuple[int, str]) -> None:
    """Train one variant with one seed in a free lane, evaluate it, and record the results."""
    seed, name = job
    lane = lanes.get()
    variant = suite.variants[name]
    folder = Path(suite.folder, name.replace(' ', '_').replace(':', ''), f'seed{seed}')

    def run(*command: str, log: str = 'log.txt') -> None:
        watch([sys.executable, *command], folder / log, cwd=lane, environment={'OMP_NUM_THREADS': '1'})

    def evaluate(row: str, *arguments: str) -> Any:
        out = folder / f'evaluate_{row}'
        shutil.rmtree(out, ignore_errors=True)  # of an interrupted run
        run('recipes/evaluate.py', f'out={out}', *arguments, log=f'evaluate_{row}.txt')
        return json.loads((out / 'results.json').read_text())

    def retrieval(row: str, *keys: str) -> Any:
        keys = (f'run={variant.run or folder / "run"}', 'batch_tokens=1024',
                'precision=${if_bf16:amp_bf16,fp32}', *variant.encoder, *keys)
        return evaluate(row, suite.evaluate, *(f'models.{row}.{key}' for key in keys))['retrieval']

    try:
        for step in variant.needs:
            with _MAKING[step.file]:  # one lane makes the file; others wait for it
                if not Path(step.file).is_file():
                    run(*step.command, log=f'made_{Path(step.file).parent.name}.txt')
        train = (*suite.train, f'seed={seed}', f'train_data.shuffle_seed={seed}')
        if suite.evaluate:
            if variant.run is None:
                run('recipes/train_stage2.py', *train, *variant.train, f'save_folder={folder}/run')
            results = retrieval(name)
        else:
            if variant.warm_start:
                run('recipes/train_stage1.py', *train, *variant.warm_start,
                    f'save_folder={folder}/warm_start', log='warm_start.txt')
                train = *train, f'text_encoder.adapters=[{folder}/warm_start/lora]'
            run('recipes/train_stage1.py', *train, *variant.train, f'save_folder={folder}/run')
            evaluation = evaluate('test', f'cra.captions={suite.captions}', 'cra.caption_keys=["0", "1"]',
                                  'cra.batch_tokens=1024', f'cra.teachers.cra={folder}/run/teacher')
            results = {'test': evaluation['cra']['cra']}
            for part in ('run', 'warm_start'):  # each has a teacher as large as its LLM
                shutil.rmtree(folder / part, ignore_errors=True)
        for row, keys in variant.also.items():
            record.add(row, seed, retrieval(row, *keys))
        record.add(name, seed, results)
    finally:
        lanes.put(lane)


def score(result: Any) -> float:
    """Return recall@10 in %, the mean of both directions; for stage 1, the accuracy of caption retrieval."""
    if isinstance(result, float):
        return result
    model, = result['models'].values()
    return statistics.mean([model['image_retrieval_recall@10'], model['text_retrieval_recall@10']])


def table(suite: Suite, record: Record) -> str:
    """Return the results as Markdown: one table per ablation and test, with one row per variant."""
    measure = 'R@10, mean of both directions' if suite.evaluate else 'accuracy of caption retrieval'
    lines = [f'{measure}, %: mean ± standard deviation over seeds', '']
    for number, ablation in enumerate(suite.ablations, 1):
        lines += [f'### {number}. {ablation.statement}', '', f'Paper: {ablation.paper}', '']
        for test, set_name in suite.tests.items():
            results = [seed[set_name] for seed in record.by_seed(ablation.variants[0])]
            first = [score(result) for result in results]
            rows = []
            for variant in ablation.variants:
                scores = [score(seed[set_name]) for seed in record.by_seed(variant)]
                num_worse = sum(value < first_value for value, first_value in zip(scores, first))
                worse = {0: 'no', len(first): 'yes'}.get(num_worse, f'in {num_worse} of {len(first)} seeds')
                mean = f'{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}'
                rows.append([variant, mean, worse])
            rows[0][2] = ''
            title = test
            if suite.evaluate:
                model, = results[0]['models'].values()
                title += f' (chance {model["chance@10"]:.1f})'
            lines.append(markdown_table([title, 'mean', 'worse than the first'], rows))
    return '\n'.join(lines)


def stop(*_: object) -> None:
    """End this process and its trainings, which have sessions of their own, when a signal arrives."""
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


def main(suite: Suite) -> None:
    """Train and measure missing variants, `LANES` at a time; start no more after a failure."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    subprocess.run(['make', suite.made_first], check=True)
    record = Record(Path(suite.folder, 'measured.json'))
    lanes = SimpleQueue()
    jobs = [(seed, name) for seed, name in itertools.product(SEEDS, suite.variants)
            if not record.has(name, seed)]
    # Streaming locks a path for one process.  A lane is a folder of links,
    # with its own paths to the same files.
    for i in range(LANES):
        lane = Path(suite.folder, f'lanes/lane{i}').absolute()
        lane.mkdir(parents=True, exist_ok=True)
        lanes.put(lane)
        for entry in Path.cwd().iterdir():
            link = lane / entry.name
            if not link.is_symlink():
                link.symlink_to(entry)
    start = time.monotonic()
    with ThreadPoolExecutor(LANES) as pool:
        try:
            for done, _ in enumerate(pool.map(partial(train_and_measure, suite, record, lanes), jobs), 1):
                left = (time.monotonic() - start) / done * (len(jobs) - done)
                print(f'{done} of {len(jobs)} done; about {left / 60:.0f} min left', flush=True)
        except ProcessFailedError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))
    text = table(suite, record)
    Path(suite.folder, 'ablations.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main(importlib.import_module(f'recipes.ablations.{sys.argv[1]}_suite').SUITE)
