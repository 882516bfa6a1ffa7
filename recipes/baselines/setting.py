# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What all comparisons have in common."""

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
# Without what open_clip does not have: several captions at once, mirrored images, another size for training.
STAGE2 = ('yamls/flickr8k/stage2.yaml', 'yamls/flickr8k/ablations_train.yaml', 'train_data.captions_per_image=1',
          'train_data.horizontal_flip=0.0', 'train_data.image_size=128', 'model.vision.image_size=128')
STREAM = 'train_data.streams.photographs'
CAPTIONS = 5
"""Of each photograph."""
SEED, ROUNDS = 17, 3


class Setting(NamedTuple):
    """Where things are, and how much is trained."""

    photographs: Path = Path('runs/flickr8k')
    """What `make photographs` prepared: `data/`, `stage1/teacher/` and `embeddings/`."""
    out: Path = Path('runs/flickr8k/baselines')
    epochs: int = CAPTIONS
    """Of stage 2 over the photographs, a multiple of `CAPTIONS`."""
    batch: int = 128
    """Photographs per step of stage 2."""
    steps: int = 150
    """Of stage 1."""
    pairs: int = 32
    """Of captions per step of stage 1."""
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
    """A command that trains, and how many steps its log says are done."""

    command: Sequence[str]
    done: Callable[[], int]


def stage1_config() -> Stage1Config:
    return load_config(Stage1Config, STAGE1)


def stage2_config() -> Stage2Config:
    return load_config(Stage2Config, STAGE2)


def count(path: Path, text: str) -> int:
    """How often a text is in a file, which need not be there yet."""
    return path.read_text(errors='replace').count(text) if path.is_file() else 0


def train(program: Program, folder: Path) -> dict[str, Any]:
    """Train in an empty folder; what `watch` finds, with the memory."""
    shutil.rmtree(folder, ignore_errors=True)
    return watch(program.command, folder.with_name(f'{folder.name}.log'), program.done, memory=True)


def paces(programs: Mapping[str, Callable[[Path], Program]], folder: Path) -> dict[str, float]:
    """Seconds per step of programs that take turns, medians over the rounds: a machine that others share is faster in
    one hour than in the next.

    Args:
        programs: Name -> folder -> a program that trains a few steps there.
        folder: For these folders, which are removed, and a file per round, which is not measured again.
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
    """What the numbers were measured on and with."""
    names = [line.split(':', 1)[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
             if line.startswith('model name')]
    packages = ('torch', 'transformers', 'timm', 'peft', 'mosaicml', 'open_clip_torch', 'sentence-transformers')
    return {'cpu': names[0] if names else platform.machine(), 'threads': threads,
            'versions': {name: version(name) for name in packages}}
