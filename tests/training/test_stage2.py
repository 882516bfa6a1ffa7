# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2.

A run has one teacher: that of its training data, of its evaluation data, the one it names, and before.
"""

from pathlib import Path

import pytest
from parts import write_text_embeddings

from llm2clip.config import (
    DatasetConfig,
    ImageDataConfig,
    ImageStreamConfig,
    ModelConfig,
    Stage2Config,
    VisionConfig,
)
from llm2clip.errors import ConfigError
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.training.stage2 import make_loaders, make_trainer
from llm2clip.training.trainer import initialize


def _data(dataset: Path, embeddings: Path) -> ImageDataConfig:
    stream = ImageStreamConfig(str(dataset), embeddings={'tiny': DatasetConfig(str(embeddings))})
    return ImageDataConfig(streams={'s': stream}, caption_weights={'short': 1.0}, num_workers=0, num_canonical_nodes=1)


def test_a_run_has_one_teacher(
    image_dataset: Path, embeddings: Path, teacher_folder: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    write_text_embeddings(image_dataset, tmp_path / 'other', causal_teacher)

    def make(train: Path, evaluation: Path, teacher: Path) -> None:
        config = Stage2Config(
            run_name='r', save_folder=str(tmp_path / 'run'), checkpoint_folder=str(tmp_path / 'run'), device='cpu',
            max_duration='1ba', global_train_batch_size=8, global_eval_batch_size=8,
            optimizer={'name': 'adamw', 'lr': 1}, scheduler={'name': 'constant'}, teacher=str(teacher),
            model=ModelConfig(VisionConfig('test_efficientnet', False, image_size=32)),
            train_data=_data(image_dataset, train), eval_data=_data(image_dataset, evaluation))
        initialize(config)
        make_trainer(config)

    with pytest.raises(ValueError, match=f'the embeddings dataset of train_data comes from another teacher than '
                                         f'{causal_teacher}'):
        make(embeddings, embeddings, causal_teacher)
    with pytest.raises(ValueError, match='eval_data comes from another teacher than train_data: '):
        make(embeddings, tmp_path / 'other', teacher_folder)
    assert not (tmp_path / 'run').exists()
    TeacherRecord(Fingerprint.of('x', {}), {'llm_embed_dim': 1}).write(tmp_path / 'run')
    with pytest.raises(ValueError, match='was begun with another teacher: .*; choose another save_folder'):
        make(embeddings, embeddings, teacher_folder)


def test_training_images_may_have_another_size_than_the_towers(image_dataset: Path, embeddings: Path) -> None:
    data = _data(image_dataset, embeddings)
    config = Stage2Config(global_train_batch_size=8, global_eval_batch_size=8, train_data=data, eval_data=data,
                          model=ModelConfig(VisionConfig('test_efficientnet', False, image_size=64)))
    data.image_size = 32
    train, (evaluator,) = make_loaders(config)
    loaders = train.dataloader, evaluator.dataloader.dataloader
    assert [next(iter(loader))['pixel_values'].shape[-1] for loader in loaders] == [32, 64]
    config.model.vision = VisionConfig('test_vit', False, image_size=64)
    with pytest.raises(ConfigError, match='train_data.image_size: test_vit takes images of .*image_size, 64'):
        make_loaders(config)
