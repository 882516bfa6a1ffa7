# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What each setting of stage 1 is worth: stage1.py OUT TRAIN NAME=DATASET … [-- key=value …]

Trains variants of `yamls/stage1/laptop.yaml` on the captions of TRAIN, three seeds each, two trainings at a time, and
measures on each of the other datasets how often the first two captions of an image find each other, without
instruction.  On every machine all is computed in float32.  All paths are relative to the current folder.
`OUT/stage1.md` is the table, `OUT/measured.json` what it is made of: what stands there is not done again.  Teachers are
removed when they have been measured.
"""

import json
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path

from lanes import in_lanes, run
from record import Record

SEEDS = (0, 1, 2)
INSTRUCTION = 'Given a caption, retrieve a similar relevant caption. '
KEYS = "['0', '1', '2', '3', '4']"
BOTH = f'[{{query: {KEYS}, positive: {KEYS}, instruction: "{INSTRUCTION}"}}, {{query: {KEYS}, positive: {KEYS}}}]'
VARIANTS: dict[str, list[str]] = {
    'nothing': [],
    'no gradient clipping': ['algorithms.gradient_clipping.clipping_threshold=1e9'],
    'scheduler.t_warmup: 20ba': ['scheduler.t_warmup=20ba'],
    'optimizer.betas: [0.9, 0.999], t_warmup: 20ba': ['optimizer.betas=[0.9, 0.999]', 'scheduler.t_warmup=20ba'],
    'causal': ['text_encoder.bidirectional=false'],
    'causal, optimizer.betas: [0.9, 0.999], t_warmup: 20ba': [
        'text_encoder.bidirectional=false', 'optimizer.betas=[0.9, 0.999]', 'scheduler.t_warmup=20ba'],
    'instruction before the query': [f'text_encoder.instruction="{INSTRUCTION}"'],
    'instruction before every second query': [f'train_data.pairs={BOTH}'],
    'a random negative for each caption': [
        f'train_data.pairs=[{{query: {KEYS}, positive: {KEYS}, random_negative: true}}]'],
    'loss_scale 20': ['loss_scale=20'],
    'LoRA of rank 64': ['lora.r=64', 'lora.lora_alpha=128'],
    'pooling: last': ['text_encoder.pooling=last'],
    'optimizer.lr: 4e-4': ['optimizer.lr=4e-4'],
    'MNTP before it': [],
    '128 pairs by GradCache, a quarter as many steps': [
        'algorithms.grad_cache={}', 'global_train_batch_size=128', 'device_train_microbatch_size=32',
        'max_duration=38ba', 'scheduler.t_warmup=10ba'],
}
WARM_STARTS: dict[str, list[str]] = {  # trainings whose adapter is merged before that of the variant is added
    'MNTP before it': [
        'objective=mntp', "train_data.texts={'0': 1, '1': 1, '2': 1, '3': 1, '4': 1}", 'global_train_batch_size=64',
        'max_duration=75ba', 'scheduler.t_warmup=20ba'],
}


def measure(
    out: Path, train: str, sets: dict[str, str], more: list[str], record: Record, job: tuple[int, str], lane: Path
) -> None:
    """Train and measure one variant with one seed."""
    seed, name = job
    folder = out / name.replace(' ', '_').replace(':', '') / f'seed{seed}'
    log = folder / 'log.txt'

    def train_stage1(target: Path, *settings: str) -> None:
        run('recipes/train_stage1.py', 'yamls/stage1/laptop.yaml', f'save_folder={target}', f'seed={seed}',
            f'train_data.shuffle_seed={seed}', f'train_data.streams.captions.local={train}', 'eval_data=null',
            'text_encoder.dtype=float32', *more, *settings, log=log, lane=lane)

    settings = VARIANTS[name]
    if name in WARM_STARTS:
        train_stage1(folder / 'warm_start', *WARM_STARTS[name])
        settings = [*settings, f'text_encoder.adapters=[{folder}/warm_start/adapter]']
    train_stage1(folder / 'run', *settings)
    for key, local in sets.items():
        run('recipes/evaluate.py', f'out={folder}/{key}', f'cra.captions={local}', 'cra.caption_keys=["0", "1"]',
            f'cra.teachers.cra={folder}/run/teacher', 'cra.batch_tokens=1024', log=log, lane=lane)
    shutil.rmtree(folder / 'run')
    shutil.rmtree(folder / 'warm_start', ignore_errors=True)
    found = {key: json.loads((folder / key / 'results.json').read_text())['cra']['cra'] for key in sets}
    record.add(name, seed, found)
    print(f'{name}, seed {seed}: {found}', flush=True)


def table(record: Record, sets: dict[str, str]) -> str:
    lines = [f'| changed | {" | ".join(sets)} |', '|---' * (len(sets) + 1) + '|']
    for name in VARIANTS:
        found = record.of(name)
        if len(found) > 1:
            cells = [[seed[key] for seed in found] for key in sets]
            lines.append(f'| {name} | ' + ' | '.join(
                f'{statistics.mean(cell):.1f} ± {statistics.stdev(cell):.1f}' for cell in cells) + ' |')
    return '\n'.join(lines) + '\n'


def main(out: Path, train: str, sets: dict[str, str], more: list[str]) -> None:
    record = Record(out / 'measured.json')
    jobs = [(seed, name) for seed in SEEDS for name in VARIANTS if not record.has(name, seed)]
    try:
        in_lanes(out / 'lanes', jobs, partial(measure, out, train, sets, more, record))
    except RuntimeError as error:
        sys.exit(str(error))
    (out / 'stage1.md').write_text(table(record, sets))
    print(table(record, sets))


if __name__ == '__main__':
    arguments, overrides = sys.argv[1:], []
    if '--' in arguments:
        split = arguments.index('--')
        arguments, overrides = arguments[:split], arguments[split + 1:]
    main(Path(arguments[0]), arguments[1], dict(argument.split('=', 1) for argument in arguments[2:]), overrides)
