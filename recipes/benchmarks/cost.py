# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Measure what precomputing saves in stage 2: python -m recipes.benchmarks.cost [quickstart|photographs]

Short trainings have the LLM in the loop (with LoRA, or frozen), or precomputed texts, or both sides
precomputed.  They read one caption of an image at a time.  Draws the time of whole trainings against their
epochs."""

import json
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from llm2clip.command import SECONDS_FILE, recorded_seconds
from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.data.schema import read_index
from recipes.benchmarks.measuring import BENCH_FOLDER, markdown_table, occurrences, watch, write_result

STEPS = 12


class Data(NamedTuple):
    """Data and settings of a training."""

    run: str
    """Output of `make quickstart` or `make photographs`, up to the text embeddings."""
    settings: tuple[str, ...]
    bound: float
    """Highest accepted ratio of epoch times, precomputed embeddings over the frozen LLM in the loop."""
    epochs: int
    """Epochs of the drawing."""


DATA = {
    # The whole tower is trained, as in the paper.
    'quickstart': Data('runs/quickstart', ('yamls/quickstart/steps.yaml', 'model.vision.freeze_blocks=0'),
                       0.5, 16),
    'photographs': Data('runs/flickr8k', ('yamls/flickr8k/stage2.yaml', 'train_data.captions_per_image=1'),
                        0.7, 12),
}
LOOP = ('text_encoder_in_loop.batch_tokens=2048',
        'text_encoder_in_loop.precision=${if_bf16:amp_bf16,fp32}')
FROZEN = ('model.vision.freeze=true', 'model.vision.freeze_blocks=0', 'lr_scale.vision_encoder=null',
          'lr_scale.visual_projection=null')
MODES: dict[str, tuple[str, ...]] = {
    'LoRA on the LLM': (*LOOP, 'trainable_text.lora={}', 'lr_scale.text_encoder=0.5'),
    'frozen LLM': (*LOOP, 'text_encoder_in_loop.enabled=true'),
    'texts precomputed': (),
    'texts precomputed, frozen tower': FROZEN,
    'both sides precomputed': (*FROZEN, 'train_data.color_jitter=0', 'train_data.grayscale=0',
                               'train_data.horizontal_flip=0', 'train_data.image_size=null'),
}


def measure(name: str) -> dict[str, dict[str, float]]:
    """Return seconds before the training, seconds per epoch and peak memory by mode."""
    data = DATA[name]
    folder = BENCH_FOLDER / f'cost_{name}'
    results = {}
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config(Stage2Config, (*data.settings, *FROZEN))
    (stream_name, stream), = config.train_data.streams.items()
    num_samples = sum(shard['samples'] for shard in read_index(Path(str(stream.local)))['shards'])
    per_epoch = num_samples / config.global_train_batch_size
    images = watch([sys.executable, 'recipes/extract_image_embeddings.py', f'out={folder}/images',
                    f'vision={json.dumps(asdict(config.model.vision))}',
                    f'datasets.train.local={stream.local}'],
                   folder / 'images.log')['seconds']
    texts = recorded_seconds(Path(data.run, 'embeddings', SECONDS_FILE))
    once = {'LoRA on the LLM': 0.0, 'frozen LLM': 0.0, 'both sides precomputed': texts + images}
    for mode, overrides in MODES.items():
        run = folder / mode.replace(' ', '_').replace(',', '')
        if mode == 'both sides precomputed':
            overrides += (f'train_data.streams.{stream_name}.image_embeddings.local={folder}/images/train',)
        measured = watch([sys.executable, 'recipes/train_stage2.py', *data.settings, *overrides,
                          'eval_data=null', f'max_duration={STEPS}ba', f'save_interval={STEPS}ba',
                          f'save_folder={run}'],
                         run.with_suffix('.log'), memory=True,
                         done=partial(occurrences, run / 'metrics.jsonl', '"loss/train/total"'))
        results[mode] = {'once_seconds': once.get(mode, texts),
                         'epoch_seconds': measured['seconds_per_step'] * per_epoch,
                         'peak_gib': measured['peak_gib']}
        print(f'{mode}: {results[mode]}', flush=True)
    return results


def draw(results: dict[str, dict[str, float]], epochs: int, file: Path) -> None:
    """Draw the minutes of a training against its epochs, with a line per mode;
    the slowest may leave the frame."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    last = {}
    for mode, row in results.items():
        last[mode] = (row['once_seconds'] + epochs * row['epoch_seconds']) / 60
        axes.plot([0, epochs], [row['once_seconds'] / 60, last[mode]], label=mode)
    axes.set(xlabel='epochs', ylabel='minutes, with the extraction', xlim=(0, epochs),
             ylim=(0, 1.1 * last['frozen LLM']))
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(file, bbox_inches='tight')


def main(name: str = 'quickstart') -> None:
    results = measure(name)
    ratio = results['texts precomputed']['epoch_seconds'] / results['frozen LLM']['epoch_seconds']
    write_result(f'cost_{name}', f'seconds per epoch with precomputed embeddings (batch 128, {name})',
                 'with the frozen LLM in the loop', ratio, results, at_most=DATA[name].bound)
    rows = [[mode, f'{row["once_seconds"]:.1f}', f'{row["epoch_seconds"]:.1f}', f'{row["peak_gib"]:.1f}']
            for mode, row in results.items()]
    text = markdown_table(['text encoder and tower', 'seconds before', 'seconds per epoch', 'peak GiB'], rows)
    (BENCH_FOLDER / f'cost_{name}.md').write_text(text)
    draw(results, DATA[name].epochs, BENCH_FOLDER / f'cost_{name}.svg')
    print(text)


if __name__ == '__main__':
    main(*sys.argv[1:])
