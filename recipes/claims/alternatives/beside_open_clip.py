# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 beside open_clip's own training program: a text tower from scratch in place of the LLM's vectors.

Equal are photographs and captions, the image tower with its ImageNet weights, the size of the images, the width of the
joint space, the number of passes over the photographs, the batch, AdamW with its weight decay, warm-up and cosine,
gradient clipping, float32, one worker that reads, and the threads.  The rest is each program's own:

- LLM2CLIP as `yamls/photographs/` has it: rate 1e-3, of which the image tower has 0.3; its first three blocks are
  locked, which a second row does without; BatchNorm keeps its ImageNet statistics, except in a third; checkpoints
  after every pass.
- open_clip: the table has a line per caption, so that an epoch is five passes, and checkpoints come at the end of an
  epoch, as often as it can write them.  One rate for all weights, 1e-3 or, in a row of its own, its default of 5e-4.
  Crops, jitter of colours and grey images as above, but by Pillow, and colours come before grey.  BatchNorm learns.
"""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from setting import CAPTIONS, SEED, STAGE2, STREAM, Setting, stage2_config
from watched import Program, count, kept, kill_and_go_on, number_after, paces, watch

from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_index, read_samples
from llm2clip.steps import SECONDS_FILE, recorded_seconds
from llm2clip.training.runs import load_checkpoint_model

__all__ = ['compare']

MODEL_SCRIPT = (sys.executable, str(Path(__file__).with_name('open_clip_model.py')))
NOT_LOCKED = 'model.vision.lock_blocks=0'
VARIANTS: dict[str, tuple[str, ...]] = {
    'llm2clip': (),
    'llm2clip, no block locked': (NOT_LOCKED,),
    'llm2clip, no block locked, BatchNorm learns': (NOT_LOCKED, 'model.vision.freeze_batch_norm=false'),
}
RATES = (1e-3, 5e-4)
# Of the trainings that are killed, which need not learn anything.
KILLED_EPOCHS, KILLED_PHOTOGRAPHS, KILLED_BATCH = 2, 64, 32
KILLED_STEPS, KILL_AFTER = KILLED_EPOCHS * CAPTIONS * KILLED_PHOTOGRAPHS // KILLED_BATCH, 15
PACED_STEPS = 12


def write_files(dataset: Path, folder: Path, batch: int) -> dict[str, Any]:
    """Photographs as files, and tables of open_clip's: all captions, those of the first photographs, and as many as
    there are in a few steps."""
    images = folder / 'images'
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    samples = read_samples(dataset)
    for sample in samples:
        path = images / sample[SAMPLE_ID]
        path.write_bytes(sample[IMAGE])
        rows.append([(str(path), text) for key, text in sample.items() if key.startswith(CAPTION) and text])
    lines = [line for own in rows for line in own]
    few = [line for own in rows[:KILLED_PHOTOGRAPHS] for line in own]
    for name, those in (('all', lines), ('few', few), ('paced', lines[:PACED_STEPS * batch])):
        with (folder / f'{name}.csv').open('w', newline='') as file:
            csv.writer(file).writerows([('image', 'caption'), *those])
    return {'photographs': len(rows), 'captions': len(lines)}


def our_program(setting: Setting, folder: Path, *more: str) -> Program:
    """Our stage 2."""
    command = [sys.executable, 'recipes/train_stage2.py', *STAGE2, f'save_folder={folder}', f'seed={SEED}',
               f'teacher={setting.teacher}', f'{STREAM}.local={setting.train}', 'device=cpu', 'precision=fp32',
               f'{STREAM}.embeddings.smollm2.local={setting.photographs}/embeddings/train', *more]
    return Program(command, lambda: count(folder / 'metrics.jsonl', '"loss/train/total"'),
                   lambda text: number_after(text, 'goes on from batch '),
                   lambda: load_checkpoint_model(folder))


def open_clip_program(
    setting: Setting, folder: Path, table: str, batch: int, epochs: int, rate: float, warmup: int
) -> Program:
    """open_clip's, on a table of `write_files`."""
    config = stage2_config()
    data, optimizer = config.train_data, config.optimizer
    jitter = data.color_jitter
    options: dict[str, Any] = {
        'model': f'local-dir:{setting.out}/open_clip/model', 'dataset-type': 'csv',
        'train-data': f'{setting.out}/open_clip/files/{table}.csv', 'csv-separator': ',', 'csv-img-key': 'image',
        'csv-caption-key': 'caption', 'logs': folder.parent, 'name': folder.name, 'batch-size': batch,
        'epochs': epochs, 'lr': rate, 'warmup': warmup, 'wd': optimizer['weight_decay'], 'beta1': 0.9, 'beta2': 0.999,
        'eps': 1e-8, 'grad-clip-norm': config.algorithms['gradient_clipping']['clipping_threshold'],
        'precision': 'fp32', 'device': 'cpu', 'workers': data.num_workers, 'seed': SEED, 'save-frequency': 1,
        'log-every-n-steps': 1, 'resume': 'latest'}
    command = [sys.executable, '-m', 'open_clip_train.main',
               *(text for name, value in options.items() for text in (f'--{name}', str(value))),
               '--aug-cfg', f'scale=({data.crop_scale[0]},{data.crop_scale[1]})', 'color_jitter_prob=1.0',
               f'color_jitter=({jitter},{jitter},{jitter},{jitter / 5})', f'gray_scale_prob={data.grayscale}']

    return Program(command, lambda: count(folder / 'out.log', 'Train Epoch'),
                   lambda text: number_after(text, '(epoch ') * (KILLED_STEPS // KILLED_EPOCHS),
                   lambda: _weights(_checkpoint(folder, epochs)))


def _checkpoint(folder: Path, epochs: int) -> Path:
    return folder / f'checkpoints/epoch_{epochs}.pt'


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What was trained, without BatchNorm's statistics, whose numbers are of another size."""
    state = torch.load(checkpoint, map_location='cpu', weights_only=True)['state_dict']
    return {name: value for name, value in state.items() if 'running_' not in name and 'num_batches' not in name}


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _train(program: Program, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    return watch(program.command, _beside(folder, '.log'), program.done)


def _our_recalls(setting: Setting, run: Path) -> dict[str, Any]:
    out = run / 'evaluate'
    watch([sys.executable, 'recipes/evaluate.py', 'yamls/photographs/claims_evaluate.yaml', f'out={out}',
           f'cache={setting.out}/text_embeddings', f'retrieval.test.source.local={setting.test}', 'device=cpu',
           f'models.llm2clip.run={run}', 'models.llm2clip.batch_tokens=1024'], _beside(run, '_evaluate.log'))
    return json.loads((out / 'results.json').read_text())['retrieval']['test']['models']['llm2clip']


def _open_clip_recalls(setting: Setting, epochs: int, run: Path) -> dict[str, Any]:
    out = run / 'recalls.json'
    watch([*MODEL_SCRIPT, 'recall', f'{setting.out}/open_clip/model', str(_checkpoint(run, epochs)), str(setting.test),
           str(out)], _beside(run, '_evaluate.log'))
    return json.loads(out.read_text())


def _row(program: Program, folder: Path, recalls: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    row = kept(_beside(folder, '.json'), partial(_train, program, folder))
    return {**row, 'recalls': kept(_beside(folder, '_recalls.json'), partial(recalls, folder))}


def compare(setting: Setting) -> dict[str, Any]:
    """Rows by name, and the seconds that LLM2CLIP's steps before stage 2 took."""
    out, files = setting.out / 'stage2', setting.out / 'open_clip'
    kept(files / 'files.json', lambda: write_files(setting.train, files / 'files', setting.batch))
    kept(files / 'model.json', lambda: watch([*MODEL_SCRIPT, 'make', str(files / 'model')], files / 'model.log'))
    rows: dict[str, Any] = {}
    ours = (f'max_duration={setting.passes}ep', f'global_train_batch_size={setting.batch}', 'save_interval=1ep')
    for name, changed in VARIANTS.items():
        folder = out / name.replace(',', '').replace(' ', '_')
        rows[name] = _row(our_program(setting, folder, *ours, *changed), folder, partial(_our_recalls, setting))
    epochs = setting.passes // CAPTIONS
    warmup = int(stage2_config().scheduler['t_warmup'].removesuffix('ba'))
    for rate in RATES:
        folder = out / f'open_clip_{rate:.0e}'
        program = open_clip_program(setting, folder, 'all', setting.batch, epochs, rate, warmup)
        rows[f'open_clip, lr {rate:g}'] = _row(program, folder, partial(_open_clip_recalls, setting, epochs))
    paced = (f'max_duration={PACED_STEPS}ba', f'global_train_batch_size={setting.batch}')
    makers: dict[str, Callable[[Path], Program]] = {name: lambda folder, changed=changed: our_program(
        setting, folder, *paced, *changed) for name, changed in VARIANTS.items()}
    makers['open_clip'] = lambda folder: open_clip_program(setting, folder, 'paced', setting.batch, 1, RATES[0], 5)
    pace, kills = paces(makers, out / 'pace'), _kills(setting, out)
    photographs = sum(shard['samples'] for shard in read_index(setting.train)['shards'])
    for name, row in rows.items():
        row['kill'] = kills[name.split(',')[0]]
        row['seconds_per_step'] = pace[name if name in pace else 'open_clip']
        row['seconds_per_pass'] = row['seconds_per_step'] * photographs / setting.batch
    before = {step: recorded_seconds(setting.photographs / step / SECONDS_FILE) for step in ('stage1', 'embeddings')}
    return {'rows': rows, 'seconds_before': before}


def _kills(setting: Setting, out: Path) -> dict[str, Any]:
    """What a kill costs each program, by short trainings that learn nothing."""
    short = (f'max_duration={KILLED_STEPS}ba', f'global_train_batch_size={KILLED_BATCH}', 'save_interval=4ba',
             'scheduler.t_warmup=5ba')
    programs: dict[str, Callable[[Path], Program]] = {
        'llm2clip': lambda folder: our_program(setting, folder, *short),
        'open_clip': lambda folder: open_clip_program(setting, folder, 'few', KILLED_BATCH, KILLED_EPOCHS, RATES[0], 5)}
    return {name: kept(out / f'kill_{name}.json', partial(
        kill_and_go_on, make, out / f'kill_{name}', KILLED_STEPS, KILL_AFTER)) for name, make in programs.items()}
