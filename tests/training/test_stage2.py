# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2: its batches, the one teacher of a run, what is checked before a model is built, and its memory."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import stage2_arguments
from parts import make_samples, write_dataset, write_text_embeddings
from recipes_in_process import as_if_a_process_ended
from refusals import refused_at

from llm2clip.config import (
    AdapterConfig,
    DatasetConfig,
    ImageDataConfig,
    ImageStreamConfig,
    ModelConfig,
    Stage2Config,
    VisionConfig,
)
from llm2clip.config.loading import load_config
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.vectors import dequantize
from llm2clip.errors import ConfigError
from llm2clip.modeling.image_processing_llm2clip import normalize
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.towers import tower_preprocessing
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.training import stage2
from llm2clip.training.config_checks import check_metrics
from llm2clip.training.stage2 import make_loaders, make_parts
from llm2clip.training.trainer import build_trainer, initialize

TOWER = VisionConfig('test_efficientnet', False, image_size=32)


def _data(dataset: Path, embeddings: Path, **options: Any) -> ImageDataConfig:
    stream = ImageStreamConfig(str(dataset), embeddings={'tiny': DatasetConfig(str(embeddings))})
    return ImageDataConfig(streams={'s': stream}, num_workers=0, num_canonical_nodes=1,
                           **{'caption_weights': {'short': 1.0}, **options})


@pytest.mark.usefixtures('no_leftovers')
@pytest.mark.parametrize('captions', [1, 2])
def test_integer_batches_give_the_loss_of_their_floats(captions: int, teacher_folder: Path, tmp_path: Path) -> None:
    """Bit for bit, in microbatches as Composer and GradCache make them."""
    write_dataset(make_samples(10), tmp_path)
    write_text_embeddings(tmp_path / 'train', tmp_path / 'embeddings', teacher_folder, storage='int8')
    config = _data(tmp_path / 'train', tmp_path / 'embeddings', caption_weights={'short': 1.0, 'long': 1.0},
                   captions_per_image=captions)
    data = build_image_loader(config, 32, 10, 5, train=True)
    batch: dict[str, Any] = next(iter(data.dataloader))
    values, scale, pixels = batch['text_embedding'], batch['text_embedding_scale'], batch['pixel_values']
    assert values.dtype == torch.int8 and scale.shape == values.shape[:-1] and pixels.dtype == torch.uint8
    of_tower = tower_preprocessing(TOWER)
    floats = {**batch, 'text_embedding': dequantize(batch),
              'pixel_values': normalize(pixels, of_tower.mean, of_tower.std)}
    del floats['text_embedding_scale']
    model = ComposerLLM2CLIP(LLM2CLIP(ModelConfig(TOWER, AdapterConfig(depth=1), embed_dim=16), 32))
    parts, expected = (data.split_batch(one, 4) for one in (batch, floats))
    assert [len(part['index']) for part in parts] == [4, 4, 2]
    for part, other in zip(parts, expected):
        part, other = data.microbatch_transforms(part), data.microbatch_transforms(other)
        assert torch.equal(model.loss(model(part), part), model.loss(model(other), other))


def _run(folder: Path, train_data: ImageDataConfig, **options: Any) -> Stage2Config:
    return Stage2Config(
        run_name='r', save_folder=str(folder), checkpoint_folder=str(folder), device='cpu', max_duration='1ba',
        global_train_batch_size=8, global_eval_batch_size=8, optimizer={'name': 'adamw', 'lr': 1},
        scheduler={'name': 'constant'}, train_data=train_data, **options)


def test_a_run_has_one_teacher(
    image_dataset: Path, embeddings: Path, teacher_folder: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    """That of its training data, of its evaluation data, the one it names, and before."""
    write_text_embeddings(image_dataset, tmp_path / 'other', causal_teacher)

    def make(evaluation: Path, teacher: Path) -> None:
        config = _run(tmp_path / 'run', _data(image_dataset, embeddings), teacher=str(teacher),
                      model=ModelConfig(TOWER), eval_data=_data(image_dataset, evaluation))
        initialize(config, {})
        make_parts(config)

    with pytest.raises(ValueError, match=f'train_data comes from another teacher than {causal_teacher}'):
        make(embeddings, causal_teacher)
    with pytest.raises(ValueError, match='eval_data comes from another teacher than train_data: '):
        make(tmp_path / 'other', teacher_folder)
    assert not (tmp_path / 'run').exists()
    TeacherRecord(Fingerprint.of('x', {}), {'llm_embed_dim': 1}).write(tmp_path / 'run')
    with pytest.raises(ValueError, match='was begun with another teacher: .*; choose another save_folder'):
        make(embeddings, teacher_folder)


def test_training_and_evaluation_refuse_vectors_of_length_1(
    image_dataset: Path, embeddings: Path, tmp_path: Path
) -> None:
    scaled = shutil.copytree(embeddings, tmp_path / 'scaled')
    record = json.loads((scaled / 'teacher.json').read_text())
    record['vectors']['normalized'] = True
    (scaled / 'teacher.json').write_text(json.dumps(record))
    data = _data(image_dataset, scaled)
    for train_data, eval_data in ((data, None), (_data(image_dataset, embeddings), data)):
        config = _run(tmp_path / 'run', train_data, eval_data=eval_data, model=ModelConfig(TOWER))
        with as_if_a_process_ended(), pytest.raises(ConfigError, match=f'dataset {scaled} '):
            make_parts(config)


def test_training_images_may_have_another_size_than_the_towers(image_dataset: Path, embeddings: Path) -> None:
    data = _data(image_dataset, embeddings)
    config = Stage2Config(global_train_batch_size=8, global_eval_batch_size=8, train_data=data, eval_data=data,
                          model=ModelConfig(VisionConfig('test_efficientnet', False, image_size=64)))
    data.image_size = 32
    train, (evaluator,) = make_loaders(config)
    loaders = train.dataloader, evaluator.dataloader.dataloader
    assert [next(iter(loader))['pixel_values'].shape[-1] for loader in loaders] == [32, 64]
    config.model.vision = VisionConfig('test_vit', False, image_size=64)
    with pytest.raises(ConfigError, match='^train_data.image_size: 32, but test_vit only takes images of .*, 64'):
        make_loaders(config)


@pytest.mark.usefixtures('no_leftovers')
def test_sharding_frees_the_whole_weights(
    image_dataset: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model, whole = stage2.make_model, []

    def remember(*args: Any, **options: Any) -> torch.nn.Module:
        model = make_model(*args, **options)
        whole.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(stage2, 'make_model', remember)
    config = load_config(Stage2Config, [
        *stage2_arguments(image_dataset, embeddings), f'save_folder={tmp_path}/run',
        'train_data.num_workers=0', 'fsdp.state_dict_type=sharded'])
    initialize(config, {})
    gc.disable()
    try:
        parts = make_parts(config)
        trainer = build_trainer(config, parts.model, parts.train_data, parts.evaluators)
        kept = [ref for ref in whole if ref() is not None]
    finally:
        gc.enable()
    trainer.close()
    assert whole and not kept


@pytest.mark.parametrize(('settings', 'key'), [
    ({'eval_first': True}, 'eval_first'),
    ({'callbacks': {'save_best': {}}}, 'callbacks.save_best.dataloader_label')])
def test_evaluations_need_data(settings: dict[str, Any], key: str) -> None:
    with refused_at(key):
        check_metrics(Stage2Config(**settings), {})
