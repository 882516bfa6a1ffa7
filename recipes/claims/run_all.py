# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Train and measure what the paper's claims need: run_all.py emoji|photograph.  What is done is not done again."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from suite import Step, Suite
from table import write_table


def run(suite: Suite, script: str, *arguments: str) -> None:
    """A script in a process of its own, whose output goes to a log that is shown if it fails."""
    log = Path(suite.folder, 'log.txt')
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        done = subprocess.run([sys.executable, script, *arguments], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f'{log.read_text()[-4000:]}\n{script} {" ".join(arguments)} failed')


def make(suite: Suite, step: Step) -> None:
    if not Path(step.file).is_file():
        run(suite, step.script, *step.arguments)


def train_and_measure(suite: Suite, name: str, seed: int) -> None:
    variant = suite.variants[name]
    for step in variant.needs:
        make(suite, step)
    folder = Path(suite.folder, name, f'seed{seed}')
    out = folder / 'evaluate'
    train = [*suite.train, *variant.train, f'seed={seed}', f'train_data.shuffle_seed={seed}', f'save_folder={folder}']
    if variant.clip_text_tower:
        run(suite, 'recipes/claims/clip_text_tower.py', *train, '--', suite.evaluate, f'out={out}')
    else:
        run(suite, 'recipes/train_stage2.py', *train)
        run(suite, 'recipes/evaluate.py', suite.evaluate, f'out={out}',
            *(f'models.{name}.{argument}' for argument in (
                f'run={folder}', 'batch_tokens=1024', 'precision=amp_bf16', *variant.encoder)))


def results(suite: Suite) -> dict[str, list[dict[str, Any]]]:
    """Variant -> what `evaluate` found for each of its seeds."""
    return {name: [json.loads(Path(suite.folder, name, f'seed{seed}', 'evaluate/results.json').read_text())['retrieval']
                   for seed in suite.seeds] for name in suite.variants}


def main(suite: Suite) -> None:
    subprocess.run(['make', suite.made_first], check=True)
    todo = [(name, seed) for seed in suite.seeds for name in suite.variants]
    seconds: list[float] = []
    for i, (name, seed) in enumerate(todo):
        done = Path(suite.folder, name, f'seed{seed}', 'evaluate/done')
        if done.is_file():
            continue
        start = time.monotonic()
        train_and_measure(suite, name, seed)
        done.touch()
        seconds.append(time.monotonic() - start)
        left = sum(seconds) / len(seconds) * (len(todo) - i - 1)
        print(f'{i + 1} of {len(todo)}: {name}, seed {seed}, {seconds[-1]:.0f} s; about {left / 60:.0f} min left',
              flush=True)
    print(write_table(suite, results(suite)))


if __name__ == '__main__':
    main(importlib.import_module(f'{sys.argv[1]}_claims').SUITE)
