# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Small models as runs leave them, with towers of both libraries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from composer.devices import DeviceCPU

from llm2clip.config import (
    AdapterConfig,
    ImageDataConfig,
    ImageStreamConfig,
    ModelConfig,
    Stage2Config,
    TowerConfig,
    VisionConfig,
)
from llm2clip.config.loading import save_config
from llm2clip.data.vectors import concatenate
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.caption_teacher import TeacherSource
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.sources import TeacherFolder

SMALL = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 3, 'num_attention_heads': 2,
         'patch_size': 8, 'image_size': 32, 'initializer_range': 0.3}
PIXELS = {'mean': [0.5, 0.4, 0.3], 'std': [0.5, 0.6, 0.7]}

Teacher = Union[Path, TeacherSource]


def _source(teacher: Teacher) -> TeacherSource:
    return teacher if isinstance(teacher, TeacherSource) else TeacherFolder(teacher)


class Trained(NamedTuple):
    """A model with random weights, its configuration, the record of its teachers, and these or their folders."""

    model: LLM2CLIP
    config: ModelConfig
    record: TeacherRecord
    teachers: Sequence[Teacher]

    def vectors(self, texts: list[str]) -> torch.Tensor:
        """What the teachers say of texts."""
        return concatenate([_source(teacher).load(DeviceCPU()).embed(texts).vectors for teacher in self.teachers])

    def pixels(self) -> torch.Tensor:
        size = self.config.vision.image_size
        return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(
    vision: str, teachers: Sequence[Teacher], adapter: str = 'residual', image_size: Optional[int] = None,
    seed: int = 3, feature_levels: int = 0, beside: Sequence[TowerConfig] = (), **options: Any,
) -> Trained:
    """A model with a tower of transformers (its `model_type`) or timm (``timm:`` and a name), for teachers or their
    folders with vectors of 32 values; `options` are those of `ModelConfig`, `seed` is of the weights."""
    if vision.startswith('timm:'):
        tower = VisionConfig(vision.removeprefix('timm:'), checkpoint='elsewhere.pth',
                             feature_levels=feature_levels, **PIXELS)
    else:
        tower = VisionConfig('a folder', architecture={'model_type': vision, **SMALL}, **PIXELS)
    tower.image_size = image_size or (64 if vision.startswith('timm:') else 32)
    tower.beside = list(beside)
    width = 32 * len(teachers)
    config = ModelConfig(tower, AdapterConfig(adapter, depth=2), **{'embed_dim': width, **options})
    fingerprint = Fingerprint.concatenate(_source(teacher).fingerprint() for teacher in teachers)
    torch.manual_seed(seed)
    model = LLM2CLIP(config, width, load_weights=False).eval()
    return Trained(model, config, TeacherRecord(fingerprint, {'llm_embed_dim': width}), teachers)


def save_run_config(folder: Path, model: ModelConfig, **options: Any) -> None:
    """What a run of stage 2 writes about itself; `options` are those of `Stage2Config`."""
    save_config(Stage2Config(**{
        'model': model, 'max_duration': '1ba', 'global_train_batch_size': 8, 'save_folder': str(folder),
        'run_name': 'r', 'optimizer': {'name': 'adamw', 'lr': 1e-5},
        'train_data': ImageDataConfig(streams={'s': ImageStreamConfig('data')}), **options}), folder)
