# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2's batches in Composer's loop: int8 vectors and uint8 pixels become floats on the way to the tower and the
adapter, and callbacks see all outputs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import torch
from composer import Callback, DataSpec, Evaluator, Trainer
from composer.core import State
from composer.loggers import InMemoryLogger, Logger
from parts import make_samples, write_dataset, write_sidecar
from streaming.base.util import clean_stale_shared_memory

from llm2clip.config import AdapterConfig, DatasetConfig, ImageDataConfig, ImageStreamConfig, ModelConfig, VisionConfig
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.image_processing_llm2clip import normalize
from llm2clip.data.vectors import vectors_of
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.training.algorithms.grad_cache import GradCache

N = 10
IMAGE_SIZE = 32
Batch = dict[str, Any]

pytestmark = pytest.mark.usefixtures('no_leftovers')


@pytest.fixture(scope='module')
def int8_data(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageDataConfig:
    folder = tmp_path_factory.mktemp('int8')
    write_dataset(make_samples(N), folder)
    write_sidecar(folder / 'train', folder / 'sidecar', teacher_folder, storage='int8')
    stream = ImageStreamConfig(str(folder / 'train'), embeddings={'tiny': DatasetConfig(str(folder / 'sidecar'))})
    return ImageDataConfig(streams={'s': stream}, caption_mix={'short': 1.0, 'long': 1.0}, num_workers=0,
                           num_canonical_nodes=1)


class _Result(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]
    recall: float
    dtypes: set[torch.dtype]


class _Keep(Callback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.loss = float('nan')

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.gradients = {name: parameter.grad.clone() for name, parameter in state.model.named_parameters()
                          if parameter.grad is not None}

    def batch_end(self, state: State, logger: Logger) -> None:
        self.loss = state.total_loss_dict['loss/train/total']


def _model() -> ComposerLLM2CLIP:
    torch.manual_seed(0)
    config = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
    return ComposerLLM2CLIP(LLM2CLIP(config, 32, load_weights=False))


def _step(train: DataSpec, evaluation: DataSpec, microbatch_size: Optional[int] = None) -> _Result:
    """One training step, which changes no weight, and an evaluation; with the gradient cache if it has microbatches."""
    model, keep, logged, dtypes = _model(), _Keep(), InMemoryLogger(), set()
    model.val_metrics['retrieval_recall@10'].k = 1
    model.model.register_forward_pre_hook(lambda module, args: dtypes.add(args[1].dtype))
    cache = [GradCache(train.split_batch, train.microbatch_transforms)] if microbatch_size else []
    trainer = Trainer(
        model=model, train_dataloader=train, max_duration='1ba', device='cpu', precision='fp32', seed=7,
        eval_dataloader=Evaluator(label='eval', dataloader=evaluation, metric_names=['retrieval_recall@10'],
                                  device_eval_microbatch_size=4),
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), algorithms=cache,
        device_train_microbatch_size=microbatch_size or N, callbacks=[keep],
        loggers=logged, progress_bar=False)
    trainer.fit()
    trainer.close()
    recall = logged.data['metrics/eval/retrieval_recall@10'][-1][1]
    return _Result(keep.loss, keep.gradients, float(recall), dtypes)


def _loaders(config: ImageDataConfig) -> tuple[DataSpec, DataSpec]:
    train, evaluation = (build_image_loader(config, IMAGE_SIZE, N, 5, train, 'data') for train in (True, False))
    return train, evaluation


def _in_float(batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the vectors in place of their int8 values, and normalised pixels."""
    result, of_tower = [], _model().model.vision_encoder.preprocessing
    for batch in batches:
        values, scale = batch['text_embedding'], batch['text_embedding_scale']
        assert values.dtype == torch.int8 and scale.shape == values.shape[:-1]
        assert batch['pixel_values'].dtype == torch.uint8 and batch['pixel_values'].is_contiguous()
        pixels = normalize(batch['pixel_values'], of_tower.mean, of_tower.std)
        rest = {name: value for name, value in batch.items() if name != 'text_embedding_scale'}
        result.append({**rest, 'text_embedding': vectors_of(batch), 'pixel_values': pixels})
    return result


@pytest.fixture(scope='module')
def batches(int8_data: ImageDataConfig) -> dict[int, tuple[list[Batch], list[Batch]]]:
    """Captions per image -> those of the training and the evaluation."""
    found = {}
    for captions in (1, 2):
        train, evaluation = _loaders(dataclasses.replace(int8_data, captions_per_image=captions))
        found[captions] = list(train.dataloader), list(evaluation.dataloader)
        clean_stale_shared_memory()
    return found


@pytest.mark.parametrize(('microbatch_size', 'captions'), [(None, 1), (4, 1), (4, 2)])
def test_int8_vectors_and_uint8_pixels_give_the_gradients_and_the_recall_of_their_floats(
    int8_data: ImageDataConfig, batches: dict[int, tuple[list[Batch], list[Batch]]], microbatch_size: Optional[int],
    captions: int,
) -> None:
    """Bit for bit, in training, in both passes of the gradient cache and in evaluation."""
    found = _step(*_loaders(dataclasses.replace(int8_data, captions_per_image=captions)), microbatch_size)
    train, evaluation = (DataSpec(_in_float(part), get_num_samples_in_batch=lambda batch: len(batch['index']))
                         for part in batches[captions])
    expected = _step(train, evaluation, microbatch_size)
    assert found.dtypes == {torch.float32}
    assert found.loss == expected.loss and found.recall == expected.recall
    assert found.gradients.keys() == expected.gradients.keys() and len(found.gradients) > 10
    for name, gradient in expected.gradients.items():
        assert gradient.any() and torch.equal(found.gradients[name], gradient), name
