# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Settings and measurements that all comparisons share."""

import os
import platform
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.config import Stage1Config, Stage2Config
from llm2clip.config.files import load_config
from recipes.benchmarks.measuring import kept, watch

__all__ = ['CAPTIONS', 'SEED', 'STAGE1', 'STAGE2', 'STREAM', 'Program', 'Setting', 'count', 'machine', 'paces',
           'stage1_config', 'stage2_config', 'train']

STAGE1 = ('yamls/flickr8k/stage1.yaml',)
# Without features that open_clip lacks: several captions per image, flips, and a different image size in training.
STAGE2 = ('yamls/flickr8k/stage2.yaml', 'yamls/flickr8k/ablations_train.yaml', 'train_data.captions_per_image=1',
          'train_data.horizontal_flip=0.0', 'train_data.image_size=128', 'model.vision.image_size=128')
STREAM = 'train_data.streams.photographs'
CAPTIONS = 5
"""Captions per photograph."""
SEED, ROUNDS = 17, 3


class Setting(NamedTuple):
    """Paths and lengths of the trainings."""

    photographs: Path = Path('runs/flickr8k')
    """Output of `make photographs`: `data/`, `stage1/teacher/` and `embeddings/`."""
    out: Path = Path('runs/flickr8k/baselines')
    epochs: int = CAPTIONS
    """Epochs of stage 2 over the photographs, a multiple of `CAPTIONS`."""
    batch: int = 128
    """Photographs per step of stage 2."""
    steps: int = 150
    """Steps of stage 1."""
    pairs: int = 32
    """Caption pairs per step of stage 1."""
    threads: int = os.cpu_count() or 1

    @property
    def train(self) -> Path:
        return self.photographs / 'data/train'

    @property
    def test(self) -> Path:
        return self.photographs / 'data/test'

    @property
    def teacher(self) -> Path:
        return self.photographs / 'stage1/teacher'


class Program(NamedTuple):
    """A training command, and a function that reads the number of finished steps from its log."""

    command: Sequence[str]
    done: Callable[[], int]


def stage1_config() -> Stage1Config:
    return load_config(Stage1Config, STAGE1)


def stage2_config() -> Stage2Config:
    return load_config(Stage2Config, STAGE2)


def count(path: Path, text: str) -> int:
    """Count the occurrences of a text in a file; 0 if the file does not exist."""
    return path.read_text(errors='replace').count(text) if path.is_file() else 0


def train(program: Program, folder: Path) -> dict[str, Any]:
    """Empty the folder and train there; return the times and peak memory that `watch` measures."""
    shutil.rmtree(folder, ignore_errors=True)
    return watch(program.command, folder.with_name(f'{folder.name}.log'), program.done, memory=True)


def paces(programs: Mapping[str, Callable[[Path], Program]], folder: Path) -> dict[str, float]:
    """Return the median seconds per step of programs over several rounds.  Programs take turns in each round, since a
    shared machine varies in speed from hour to hour.

    Args:
        programs: Name -> function that maps a folder to a program that trains a few steps there.
        folder: Holds the temporary training folder and one file per round.  Rounds with a file are not repeated.
    """
    def measure() -> dict[str, float]:
        found = {}
        for name, make in programs.items():
            shutil.rmtree(run := folder / 'run', ignore_errors=True)
            program = make(run)
            found[name] = watch(program.command, folder / 'run.log', program.done)['seconds_per_step']
        return found

    rounds = [kept(folder / f'round{i}.json', measure) for i in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) for name in programs}


def machine(threads: int) -> dict[str, Any]:
    """Return CPU, number of threads and package versions."""
    names = [line.split(':', 1)[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
             if line.startswith('model name')]
    packages = ('torch', 'transformers', 'timm', 'peft', 'mosaicml', 'open_clip_torch', 'sentence-transformers')
    return {'cpu': names[0] if names else platform.machine(), 'threads': threads,
            'versions': {name: version(name) for name in packages}}
