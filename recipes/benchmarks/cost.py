# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark stage 2 with LoRA or a frozen LLM in the loop, with precomputed captions, and with both sides precomputed.

Measures seconds per epoch, and recall after equal epochs: python -m recipes.benchmarks.cost [quickstart|photographs]"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from composer import Callback, State
from composer.loggers import Logger

from llm2clip.config import DatasetConfig, ExtractImagesConfig, LoraConfig, Stage2Config, TextEncoderInLoopConfig
from llm2clip.config.files import load_config
from llm2clip.device import computes_bfloat16, open_device
from llm2clip.models.frozen_tower import load_frozen_tower
from llm2clip.remotes import OutputFolder
from llm2clip.teacher.extraction import EmbeddingsDataset, extract_text_embeddings
from llm2clip.teacher.sources import teacher_source
from llm2clip.training.stage2 import make_trainer
from recipes.benchmarks.measuring import BENCH_FOLDER, markdown_table, run_alone, write_result


class Data(NamedTuple):
    """Data and settings of a training."""

    made: str
    """Target that `make` builds first."""
    settings: tuple[str, ...]
    """YAML files and overrides of the training."""
    epochs: int
    bound: float
    """Highest accepted ratio of epoch times, precomputed embeddings over the frozen LLM in the loop."""


DATA = {
    # The whole tower is trained, as in the paper.
    'quickstart': Data('runs/quickstart/embeddings/config.yaml',
                       ('yamls/stage2/quickstart.yaml', 'model.vision.freeze_blocks=0'), 5, 0.5),
    # Smaller images as in the ablations, and one caption per image, since an LLM in the loop reads them in every epoch.
    'photographs': Data('runs/flickr8k/embeddings/config.yaml', (
        'yamls/flickr8k/stage2.yaml', 'train_data.captions_per_image=1', 'train_data.image_size=128',
        'model.vision.image_size=160'), 3, 0.7),
}
BATCH_TOKENS, PRECISION = 2048, 'amp_bf16' if computes_bfloat16() else 'fp32'
MODES = {'lora': 'LoRA in the loop', 'text_encoder_in_loop': 'frozen in the loop', 'precomputed': 'precomputed',
         'frozen_tower': 'precomputed, frozen tower in the loop', 'both_precomputed': 'both sides precomputed'}


class EpochTimes(Callback):
    """Callback that measures the seconds of each epoch, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._start = time.perf_counter()

    def epoch_end(self, state: State, logger: Logger) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def make_config(data: Data, folder: Path) -> Stage2Config:
    return load_config(Stage2Config, [
        *data.settings, f'max_duration={data.epochs}ep', f'eval_interval={data.epochs}ep',
        f'save_interval={data.epochs}ep', f'save_folder={folder}/run', 'progress_bar=false'])


def precompute(config: Stage2Config, folder: Path, images: bool) -> float:
    """Write the embeddings of the captions and, with `images`, of the images; set them in `config`; return seconds."""
    start = time.perf_counter()
    stream, = config.train_data.streams.values()
    teacher = teacher_source(config.teacher).load(open_device(None), BATCH_TOKENS, PRECISION)
    extract_text_embeddings(EmbeddingsDataset(DatasetConfig(local=stream.local),
                                              OutputFolder(str(folder / 'embeddings'))), teacher)
    stream.embeddings = {'smollm2': DatasetConfig(local=str(folder / 'embeddings'))}
    if images:
        tower = load_frozen_tower(ExtractImagesConfig(vision=config.model.vision), open_device(None).name)
        extract_text_embeddings(EmbeddingsDataset(
            DatasetConfig(local=stream.local), OutputFolder(str(folder / 'images')), views=0), tower)
        stream.image_embeddings = DatasetConfig(local=str(folder / 'images'))
        config.train_data.color_jitter = config.train_data.grayscale = config.train_data.horizontal_flip = 0.0
        config.train_data.image_size = None
    return time.perf_counter() - start


def train(mode: str, config: Stage2Config) -> dict[str, float]:
    """Train once; return the median seconds per epoch, the final recall@10 in %, and peak memory in GiB."""
    if mode == 'lora':
        config.lr_scale = {**config.lr_scale, 'text_encoder': 0.5}
        config.trainable_text.lora = LoraConfig()
    config.text_encoder_in_loop = TextEncoderInLoopConfig(mode == 'text_encoder_in_loop', batch_tokens=BATCH_TOKENS,
                                                          precision=PRECISION)
    trainer = make_trainer(config)
    times = EpochTimes()
    trainer.state.callbacks.append(times)
    trainer.fit()
    recall = trainer.state.eval_metrics['eval']['retrieval_recall@10'].compute().item()
    trainer.close()
    peak = (torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    return {'epoch_seconds': statistics.median(times.seconds), 'recall@10': recall, 'peak_gib': peak}


def run_mode(data: Data, mode: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        config = make_config(data, Path(name))
        if mode in ('frozen_tower', 'both_precomputed'):
            config.model.vision.freeze, config.model.vision.freeze_blocks = True, 0
            config.lr_scale = {}
        in_loop = mode in ('lora', 'text_encoder_in_loop')
        once = 0.0 if in_loop else precompute(config, Path(name), mode == 'both_precomputed')
        return {**train(mode, config), 'once_seconds': once}


def main(name: str) -> None:
    data, results = DATA[name], {}
    subprocess.run(['make', data.made], check=True)
    for mode in MODES:
        results[mode] = run_alone('recipes.benchmarks.cost', name, mode)
        print(f'{MODES[mode]}: {results[mode]}', flush=True)
    base, file = results['precomputed'], 'cost' if name == 'quickstart' else f'cost_{name}'
    write_result(file, f'seconds per epoch with precomputed embeddings ({data.epochs} epochs, batch 128, {name})',
                 'with the frozen LLM in the loop',
                 base['epoch_seconds'] / results['text_encoder_in_loop']['epoch_seconds'], results, at_most=data.bound)
    text = markdown_table(
        ['teacher', 'seconds per epoch', '× precomputed', 'seconds once', 'R@10', 'peak GiB'],
        [[MODES[mode], f'{row["epoch_seconds"]:.1f}', f'{row["epoch_seconds"] / base["epoch_seconds"]:.1f}',
          f'{row["once_seconds"]:.0f}', f'{row["recall@10"]:.1f}', f'{row["peak_gib"]:.1f}']
         for mode, row in results.items()])
    (BENCH_FOLDER / f'{file}.md').write_text(text)
    print(text)


if __name__ == '__main__':
    if sys.argv[2:]:
        print(json.dumps(run_mode(DATA[sys.argv[1]], sys.argv[2])))
    else:
        main(*(sys.argv[1:] or ['quickstart']))
