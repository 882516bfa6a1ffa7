# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Train and measure what the paper's claims need, in small: run_all.py.  What is done is not done again."""

import json
import subprocess
import sys
import time
from pathlib import Path

from table import write_table
from variants import CLIP_TOWER, QUICKSTART, RUN, SEEDS, UNTUNED, UNTUNED_ENCODER, VARIANTS

TRAIN = ['yamls/stage2/quickstart.yaml', 'yamls/claims/train.yaml']
EVALUATE = 'yamls/claims/evaluate.yaml'


def run(script: str, *arguments: str) -> None:
    """A script in a process of its own, whose output goes to a log that is shown if it fails."""
    log = Path(RUN, 'log.txt')
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        done = subprocess.run([sys.executable, script, *arguments], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f'{log.read_text()[-4000:]}\n{script} {" ".join(arguments)} failed')


def teacher_arguments(variant: str) -> list[str]:
    """How `evaluate` finds the teacher of a run."""
    if variant == UNTUNED:
        return [f'models.{variant}.{argument}' for argument in UNTUNED_ENCODER]
    return [f'models.{variant}.teacher={QUICKSTART}/stage1/teacher']


def train_and_measure(variant: str, seed: int) -> None:
    folder = Path(RUN, variant, f'seed{seed}')
    out = folder / 'evaluate'
    train = [*TRAIN, *VARIANTS[variant], f'seed={seed}', f'train_data.shuffle_seed={seed}', f'save_folder={folder}']
    if variant == CLIP_TOWER:
        run('recipes/claims/clip_text_tower.py', *train, '--', EVALUATE, f'out={out}')
    else:
        run('recipes/train_stage2.py', *train)
        run('recipes/evaluate.py', EVALUATE, f'out={out}', f'models.{variant}.run={folder}',
            f'models.{variant}.batch_tokens=2048', f'models.{variant}.precision=amp_bf16',
            *teacher_arguments(variant))


def main() -> None:
    subprocess.run(['make', f'{QUICKSTART}/embeddings/config.yaml'], check=True)
    if not Path(RUN, 'untuned_embeddings/config.yaml').is_file():
        run('recipes/extract_embeddings.py', *UNTUNED_ENCODER, f'out={RUN}/untuned_embeddings',
            f'datasets.train.local={QUICKSTART}/data/emoji/train', 'batch_tokens=2048', 'precision=amp_bf16')
    todo = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    seconds: list[float] = []
    for i, (variant, seed) in enumerate(todo):
        done = Path(RUN, variant, f'seed{seed}', 'evaluate/done')
        if done.is_file():
            continue
        start = time.monotonic()
        train_and_measure(variant, seed)
        done.touch()
        seconds.append(time.monotonic() - start)
        left = sum(seconds) / len(seconds) * (len(todo) - i - 1)
        print(f'{i + 1} of {len(todo)}: {variant}, seed {seed}, {seconds[-1]:.0f} s; about {left / 60:.0f} min left',
              flush=True)
    results = {variant: [json.loads(Path(RUN, variant, f'seed{seed}', 'evaluate/results.json').read_text())
                         for seed in SEEDS] for variant in VARIANTS}
    print(write_table({variant: [result['retrieval'] for result in seeds] for variant, seeds in results.items()}))


if __name__ == '__main__':
    main()
