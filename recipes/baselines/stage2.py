# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compare stage 2 with open_clip's training program, which trains a text tower from scratch in place of the LLM.

Both use the same photographs and captions, image tower with ImageNet weights, image size and width of the joint space.
They share epochs over the photographs, batch, float32, gradient clipping, one worker and the number of threads.  AdamW
has the same weight decay, warm-up and cosine schedule.  They differ in the following:

- LLM2CLIP follows `yamls/flickr8k/`.  The learning rate is 1e-3, and 0.3 of it for the image tower.  The tower's first
  three blocks are frozen; a second row freezes none.  BatchNorm keeps its ImageNet statistics; a third row freezes
  neither blocks nor statistics.  A checkpoint is saved after every epoch.
- open_clip reads one row per caption, so one of its epochs is five over the photographs.  All weights have one learning
  rate: 1e-3, or the default of 5e-4 in a separate row.  Crops, colour jitter and grayscale are as above, but by Pillow,
  and with jitter before grayscale.  BatchNorm is trained.
"""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.command import SECONDS_FILE, recorded_seconds
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_index, read_samples
from recipes.baselines.setting import (
    CAPTIONS,
    SEED,
    STAGE2,
    STREAM,
    Program,
    Setting,
    count,
    paces,
    stage2_config,
    train,
)
from recipes.benchmarks.measuring import kept, watch

__all__ = ['compare']

MODEL_SCRIPT = (sys.executable, '-m', 'recipes.baselines.open_clip_model')
NOT_FROZEN = 'model.vision.freeze_blocks=0'
VARIANTS: dict[str, tuple[str, ...]] = {
    'llm2clip': (),
    'llm2clip, no block locked': (NOT_FROZEN,),
    'llm2clip, no block locked, BatchNorm learns': (NOT_FROZEN, 'model.vision.freeze_batch_norm=false'),
}
RATES = (1e-3, 5e-4)
PACED_STEPS = 12


def write_files(dataset: Path, folder: Path, batch: int) -> dict[str, Any]:
    """Write photographs as files, and two tables for open_clip: all captions, and enough for `PACED_STEPS` steps."""
    images, lines = folder / 'images', []
    images.mkdir(parents=True, exist_ok=True)
    for sample in read_samples(dataset):
        path = images / sample[SAMPLE_ID]
        path.write_bytes(sample[IMAGE])
        lines += [(str(path), text) for key, text in sample.items() if key.startswith(CAPTION) and text]
    for name, rows in (('all', lines), ('paced', lines[:PACED_STEPS * batch])):
        with (folder / f'{name}.csv').open('w', newline='') as file:
            csv.writer(file).writerows([('image', 'caption'), *rows])
    return {'captions': len(lines)}


def our_program(setting: Setting, length: str, changed: tuple[str, ...], folder: Path) -> Program:
    command = [sys.executable, 'recipes/train_stage2.py', *STAGE2, f'save_folder={folder}', f'seed={SEED}',
               f'teacher={setting.teacher}', f'{STREAM}.local={setting.train}', 'device=cpu', 'precision=fp32',
               f'{STREAM}.embeddings.smollm2.local={setting.photographs}/embeddings/train', f'max_duration={length}',
               f'global_train_batch_size={setting.batch}', 'save_interval=1ep', *changed]
    return Program(command, lambda: count(folder / 'metrics.jsonl', '"loss/train/total"'))


def open_clip_program(setting: Setting, table: str, epochs: int, rate: float, warmup: int, folder: Path) -> Program:
    """Return open_clip's training program on a table of `write_files`."""
    config = stage2_config()
    data, optimizer = config.train_data, config.optimizer
    jitter = data.color_jitter
    options: dict[str, Any] = {
        'model': f'local-dir:{setting.out}/open_clip/model', 'dataset-type': 'csv',
        'train-data': f'{setting.out}/open_clip/files/{table}.csv', 'csv-separator': ',', 'csv-img-key': 'image',
        'csv-caption-key': 'caption', 'logs': folder.parent, 'name': folder.name, 'batch-size': setting.batch,
        'epochs': epochs, 'lr': rate, 'warmup': warmup, 'wd': optimizer['weight_decay'], 'beta1': 0.9, 'beta2': 0.999,
        'eps': 1e-8, 'grad-clip-norm': config.algorithms['gradient_clipping']['clipping_threshold'],
        'precision': 'fp32', 'device': 'cpu', 'workers': data.num_workers, 'seed': SEED, 'save-frequency': 1,
        'log-every-n-steps': 1, 'resume': 'latest'}
    command = [sys.executable, '-m', 'open_clip_train.main',
               *(text for name, value in options.items() for text in (f'--{name}', str(value))),
               '--aug-cfg', f'scale=({data.crop_scale[0]},{data.crop_scale[1]})', 'color_jitter_prob=1.0',
               f'color_jitter=({jitter},{jitter},{jitter},{jitter / 5})', f'gray_scale_prob={data.grayscale}']
    return Program(command, lambda: count(folder / 'out.log', 'Train Epoch'))


def our_recalls(setting: Setting, run: Path) -> dict[str, Any]:
    out = run / 'evaluate'
    watch([sys.executable, 'recipes/evaluate.py', 'yamls/flickr8k/ablations_evaluate.yaml', f'out={out}',
           f'cache={setting.out}/text_embeddings', f'retrieval.test.source.local={setting.test}', 'device=cpu',
           f'models.llm2clip.run={run}', 'models.llm2clip.batch_tokens=1024'], run / 'evaluate.log')
    return json.loads((out / 'results.json').read_text())['retrieval']['test']['models']['llm2clip']


def open_clip_recalls(setting: Setting, epochs: int, run: Path) -> dict[str, Any]:
    watch([*MODEL_SCRIPT, 'recall', f'{setting.out}/open_clip/model', f'{run}/checkpoints/epoch_{epochs}.pt',
           str(setting.test), f'{run}/recalls.json'], run / 'evaluate.log')
    return json.loads((run / 'recalls.json').read_text())


def compare(setting: Setting) -> dict[str, Any]:
    """Return rows by name, and the seconds that LLM2CLIP's stage 1 and extraction took."""
    out, files = setting.out / 'stage2', setting.out / 'open_clip'
    kept(files / 'files.json', lambda: write_files(setting.train, files / 'files', setting.batch))
    kept(files / 'model.json', lambda: watch([*MODEL_SCRIPT, 'make', str(files / 'model')], files / 'model.log'))
    epochs, warmup = setting.epochs // CAPTIONS, int(stage2_config().scheduler['t_warmup'].removesuffix('ba'))
    makers: dict[str, Callable[[Path], Program]] = {
        **{name: partial(our_program, setting, f'{setting.epochs}ep', changed) for name, changed in VARIANTS.items()},
        **{f'open_clip, lr {rate:g}': partial(open_clip_program, setting, 'all', epochs, rate, warmup)
           for rate in RATES}}
    paced: dict[str, Callable[[Path], Program]] = {
        **{name: partial(our_program, setting, f'{PACED_STEPS}ba', changed) for name, changed in VARIANTS.items()},
        'open_clip': partial(open_clip_program, setting, 'paced', 1, RATES[0], 5)}
    pace = paces(paced, out / 'pace')
    photographs = sum(shard['samples'] for shard in read_index(setting.train)['shards'])
    rows: dict[str, Any] = {}
    for name, make in makers.items():
        folder, ours = out / name.replace(',', '').replace(' ', '_'), name in VARIANTS
        recalls = partial(our_recalls, setting) if ours else partial(open_clip_recalls, setting, epochs)
        rows[name] = {**kept(out / f'{folder.name}.json', partial(train, make(folder), folder)),
                      'recalls': kept(out / f'{folder.name}_recalls.json', partial(recalls, folder)),
                      'seconds_per_epoch': pace[name if ours else 'open_clip'] * photographs / setting.batch}
    before = {step: recorded_seconds(setting.photographs / step / SECONDS_FILE) for step in ('stage1', 'embeddings')}
    return {'rows': rows, 'seconds_before': before}
