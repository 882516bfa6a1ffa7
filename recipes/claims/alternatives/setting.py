# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What all comparisons have in common."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.config import Stage1Config, Stage2Config
from llm2clip.config.files import load_config

__all__ = ['CAPTIONS', 'SEED', 'STAGE1', 'STAGE2', 'STREAM', 'Setting', 'machine', 'stage1_config', 'stage2_config']

STAGE1 = ('yamls/photographs/stage1.yaml',)
# Without what open_clip does not have: several captions at once, mirrored images, another size for training.
STAGE2 = ('yamls/photographs/stage2.yaml', 'yamls/photographs/claims_train.yaml', 'train_data.captions_per_image=1',
          'train_data.horizontal_flip=0.0', 'train_data.image_size=128', 'model.vision.image_size=128')
STREAM = 'train_data.streams.photographs'
CAPTIONS = 5
"""Of each photograph."""
SEED = 17


class Setting(NamedTuple):
    """Where things are, and how much is trained."""

    out: Path
    photographs: Path
    """What `make photographs` prepared: `data/`, `stage1/teacher/` and `embeddings/`."""
    passes: int
    """Of stage 2 over the photographs."""
    batch: int
    """Photographs per step of stage 2."""
    steps: int
    """Of stage 1."""
    pairs: int
    """Of captions per step of stage 1."""
    threads: int

    @property
    def train(self) -> Path:
        return self.photographs / 'data/train'

    @property
    def test(self) -> Path:
        return self.photographs / 'data/test'

    @property
    def teacher(self) -> Path:
        return self.photographs / 'stage1/teacher'


def stage1_config() -> Stage1Config:
    return load_config(Stage1Config, STAGE1)


def stage2_config() -> Stage2Config:
    return load_config(Stage2Config, STAGE2)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    names = [line.split(':', 1)[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
             if line.startswith('model name')]
    packages = ('torch', 'transformers', 'timm', 'peft', 'mosaicml', 'open_clip_torch', 'sentence-transformers')
    return {'cpu': names[0] if names else platform.machine(), 'threads': threads,
            'versions': {name: version(name) for name in packages}}
