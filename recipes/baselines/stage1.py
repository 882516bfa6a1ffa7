# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compare stage 1 with the trainer of sentence-transformers.

Both use the photographs' captions, the same folder of SmolLM2-135M in bfloat16, LoRA of the same rank in float32, and
mean pooling.  They share steps, pairs per step, gradient clipping, one worker and the number of threads.  AdamW has the
same learning rate, betas, warm-up and decay to zero.  Both scale similarities by 50; sentence-transformers' default is
20.  LLM2CLIP drops the causal mask, trains both directions, and draws two captions of a photograph in every epoch.
sentence-transformers keeps the mask, trains from anchor to positive, and has two fixed captions per photograph.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from recipes.baselines.setting import SEED, STAGE1, STREAM, Program, Setting, count, paces, stage1_config, train
from recipes.benchmarks.measuring import kept, watch

__all__ = ['SCRIPT', 'compare']

SCRIPT = (sys.executable, '-m', 'recipes.baselines.sentence_transformers_model')
LOSSES = ('CachedMultipleNegativesRankingLoss', 'MultipleNegativesRankingLoss')
PACED_STEPS = 12
# Both compute the same gradients.  GradCache has 32 texts per microbatch, sentence-transformers' default.
WAYS = {'llm2clip': (), 'llm2clip, grad_cache': ('algorithms.grad_cache={}', 'device_train_microbatch_size=16')}


def our_program(setting: Setting, way: str, steps: int, warmup: int, folder: Path) -> Program:
    command = [sys.executable, 'recipes/train_stage1.py', *STAGE1, f'save_folder={folder}', f'seed={SEED}',
               f'{STREAM}.local={setting.train}', 'eval_data=null', 'device=cpu', f'max_duration={steps}ba',
               f'text_encoder.pretrained={setting.out}/base', 'text_encoder.gguf_file=null',
               f'global_train_batch_size={setting.pairs}', f'scheduler.t_warmup={warmup}ba', *WAYS[way]]
    return Program(command, lambda: count(folder / 'metrics.jsonl', '"loss/train/total"'))


def their_program(setting: Setting, loss: str, steps: int, warmup: int, folder: Path) -> Program:
    command = [*SCRIPT, 'train', f'{setting.out}/base', str(setting.train), str(folder), loss,
               *map(str, (steps, setting.pairs, warmup))]
    return Program(command, lambda: count(folder / 'steps.txt', 'step'))


def our_accuracy(setting: Setting, run: Path) -> dict[str, Any]:
    out = run / 'evaluate'
    watch([sys.executable, 'recipes/evaluate.py', f'out={out}', f'cra.captions={setting.test}',
           'cra.caption_keys=["0", "1"]', f'cra.teachers.cra={run}/teacher', 'cra.batch_tokens=1024', 'device=cpu'],
          run / 'evaluate.log')
    return {'cra': json.loads((out / 'results.json').read_text())['cra']['cra']}


def their_accuracy(setting: Setting, run: Path) -> dict[str, Any]:
    out = run / 'accuracy.json'
    watch([*SCRIPT, 'accuracy', f'{run}/final', str(setting.test), str(out)], run / 'evaluate.log')
    return {'cra': json.loads(out.read_text())}


def compare(setting: Setting) -> dict[str, Any]:
    """Train and measure all programs; return rows by name."""
    out = setting.out / 'stage1'
    kept(setting.out / 'base.json', lambda: watch([*SCRIPT, 'base', f'{setting.out}/base'], setting.out / 'base.log'))
    warmup = min(int(stage1_config().scheduler['t_warmup'].removesuffix('ba')), setting.steps)
    makers = {**{name: partial(our_program, setting, name) for name in WAYS},
              **{f'sentence-transformers, {loss}': partial(their_program, setting, loss) for loss in LOSSES}}
    pace = paces({name: partial(make, PACED_STEPS, 2) for name, make in makers.items()}, out / 'pace')
    rows: dict[str, Any] = {}
    for name, make in makers.items():
        folder = out / name.split(', ')[-1]
        accuracy = our_accuracy if name in WAYS else their_accuracy
        rows[name] = {
            **kept(out / f'{folder.name}.json', partial(train, make(setting.steps, warmup, folder), folder)),
            **kept(out / f'{folder.name}_cra.json', partial(accuracy, setting, folder)),
            'seconds_per_step': pace[name]}
    return rows
