# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 beside the trainer of sentence-transformers.

Equal are the photographs' captions, SmolLM2-135M as one folder in bfloat16, LoRA of the same rank in float32, mean
pooling, steps and pairs per step, AdamW with its rate, betas, warm-up and decay to zero, gradient clipping, the factor
on the similarities (50, where sentence-transformers would have 20), the steps between checkpoints, one worker, and the
threads.  The rest is each program's own: LLM2CLIP drops the causal mask, learns both directions, and draws two captions
of a photograph each time it is seen; sentence-transformers keeps the mask, learns from the anchor to the positive, and
has two captions per photograph that were drawn before.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from setting import SEED, STAGE1, STREAM, Setting, stage1_config
from watched import Program, count, kept, kill_and_go_on, number_after, paces, watch

__all__ = ['compare']

SCRIPT = (sys.executable, str(Path(__file__).with_name('sentence_transformers_model.py')))
LOSSES = ('CachedMultipleNegativesRankingLoss', 'MultipleNegativesRankingLoss')
# Of the trainings that are killed, which need not learn anything.
KILLED_STEPS, KILLED_PAIRS, KILL_AFTER, KILLED_SAVE = 12, 8, 10, 4
PACED_STEPS = 12
# Options of LLM2CLIP that change nothing of what is learned.  The gradient cache has as many texts in a pass as that of
# sentence-transformers has by default.
WAYS = {'llm2clip': (), 'llm2clip, compile': ('compile={}',),
        'llm2clip, grad_cache': ('algorithms.grad_cache={}', 'device_train_microbatch_size=16')}


def our_program(
    setting: Setting, way: str, folder: Path, steps: int, pairs: int, warmup: int, save: int
) -> Program:
    command = [sys.executable, 'recipes/train_stage1.py', *STAGE1, f'save_folder={folder}', f'seed={SEED}',
               f'{STREAM}.local={setting.train}', 'eval_data=null', 'device=cpu', f'max_duration={steps}ba',
               f'text_encoder.pretrained={setting.out}/base', 'text_encoder.gguf_file=null',
               f'global_train_batch_size={pairs}', f'scheduler.t_warmup={warmup}ba', f'save_interval={save}ba',
               *WAYS[way]]
    return Program(command, lambda: count(folder / 'metrics.jsonl', '"loss/train/total"'),
                   lambda text: number_after(text, 'goes on from batch '),
                   lambda: load_file(folder / 'adapter/adapter_model.safetensors'))


def their_program(
    setting: Setting, loss: str, folder: Path, steps: int, pairs: int, warmup: int, save: int
) -> Program:
    command = [*SCRIPT, 'train', f'{setting.out}/base', str(setting.train), str(folder), loss,
               *map(str, (steps, pairs, warmup, save))]
    return Program(command, lambda: count(folder / 'steps.txt', 'step'),
                   lambda text: number_after(text, 'goes on from step '),
                   lambda: load_file(folder / 'final/adapter_model.safetensors'))


def _train(program: Program, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    return watch(program.command, folder.with_suffix('.log'), program.done)


def _our_accuracy(setting: Setting, run: Path) -> dict[str, Any]:
    out = run / 'evaluate'
    watch([sys.executable, 'recipes/evaluate.py', f'out={out}', f'cra.captions={setting.test}',
           'cra.caption_keys=["0", "1"]', f'cra.teachers.cra={run}/teacher', 'cra.batch_tokens=1024', 'device=cpu'],
          run.with_name(f'{run.name}_evaluate.log'))
    return {'cra': json.loads((out / 'results.json').read_text())['cra']['cra']}


def _their_accuracy(setting: Setting, run: Path) -> dict[str, Any]:
    out = run / 'accuracy.json'
    watch([*SCRIPT, 'accuracy', f'{run}/final', str(setting.test), str(out)],
          run.with_name(f'{run.name}_evaluate.log'))
    return {'cra': json.loads(out.read_text())}


def compare(setting: Setting) -> dict[str, Any]:
    """Rows by name."""
    out, config = setting.out / 'stage1', stage1_config()
    kept(setting.out / 'base.json', lambda: watch([*SCRIPT, 'base', f'{setting.out}/base'], setting.out / 'base.log'))
    warmup = min(int(config.scheduler['t_warmup'].removesuffix('ba')), setting.steps)
    length = setting.steps, setting.pairs, warmup, int(str(config.save_interval).removesuffix('ba'))
    short = KILLED_STEPS, KILLED_PAIRS, 2, KILLED_SAVE
    makers = {**{name: partial(our_program, setting, name) for name in WAYS},
              **{f'sentence-transformers, {loss}': partial(their_program, setting, loss) for loss in LOSSES}}
    rows: dict[str, Any] = {}
    for name, make in makers.items():
        folder = out / name.split(', ')[-1]
        accuracy = _our_accuracy if name in WAYS else _their_accuracy
        rows[name] = {
            **kept(folder.with_suffix('.json'), partial(_train, make(folder, *length), folder)),
            **kept(folder.with_name(f'{folder.name}_cra.json'), partial(accuracy, setting, folder)),
            'kill': kept(folder.with_name(f'{folder.name}_kill.json'), partial(
                kill_and_go_on, lambda at, make=make: make(at, *short), folder.with_name(f'{folder.name}_kill'),
                KILLED_STEPS, KILL_AFTER))}
    paced = PACED_STEPS, setting.pairs, 2, PACED_STEPS
    pace = paces({name: lambda at, make=make: make(at, *paced) for name, make in makers.items()}, out / 'pace')
    return {name: {**row, 'seconds_per_step': pace[name]} for name, row in rows.items()}
