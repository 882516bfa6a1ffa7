# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2's batches in Composer's loop: int8 vectors and uint8 pixels become floats on the way to the model."""

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.core import State
from composer.loggers import Logger
from parts import make_samples, write_dataset, write_text_embeddings

from llm2clip.config import AdapterConfig, DatasetConfig, ImageDataConfig, ImageStreamConfig, ModelConfig, VisionConfig
from llm2clip.data.image_embeddings import build_image_loader, vectors_of
from llm2clip.data.image_processing_llm2clip import normalize
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.towers import tower_preprocessing
from llm2clip.training.algorithms.grad_cache import GradCache

N = 10

pytestmark = pytest.mark.usefixtures('no_leftovers')


class _Keep(Callback):
    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.found = {name: parameter.grad.clone() for name, parameter in state.model.named_parameters()
                      if parameter.grad is not None}

    def batch_end(self, state: State, logger: Logger) -> None:
        self.found['loss'] = torch.tensor(state.total_loss_dict['loss/train/total'])


def _step(data: DataSpec, microbatch_size: Optional[int]) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step, with GradCache if it has microbatches."""
    torch.manual_seed(0)
    config = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
    model, keep = ComposerLLM2CLIP(LLM2CLIP(config, 32, load_weights=False)), _Keep()
    trainer = Trainer(
        model=model, train_dataloader=data, max_duration='1ba', device='cpu', precision='fp32', seed=7,
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), progress_bar=False,
        algorithms=[GradCache(data.split_batch, data.microbatch_transforms)] if microbatch_size else [],
        device_train_microbatch_size=microbatch_size or N, callbacks=[keep])
    trainer.fit()
    trainer.close()
    return keep.found


@pytest.mark.parametrize(('microbatch_size', 'captions'), [(None, 1), (4, 2)])
def test_int8_vectors_and_uint8_pixels_give_the_gradients_of_their_floats(
    microbatch_size: Optional[int], captions: int, teacher_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit, also in both passes of GradCache."""
    write_dataset(make_samples(N), tmp_path)
    write_text_embeddings(tmp_path / 'train', tmp_path / 'embeddings', teacher_folder, storage='int8')
    stream = ImageStreamConfig(str(tmp_path / 'train'),
                               embeddings={'tiny': DatasetConfig(str(tmp_path / 'embeddings'))})
    config = ImageDataConfig(streams={'s': stream}, caption_weights={'short': 1.0, 'long': 1.0}, num_workers=0,
                             num_canonical_nodes=1, captions_per_image=captions)
    data = build_image_loader(config, 32, N, 5, True, 'data')
    batch: dict[str, Any] = next(iter(data.dataloader))
    values, scale, pixels = batch['text_embedding'], batch['text_embedding_scale'], batch['pixel_values']
    assert values.dtype == torch.int8 and scale.shape == values.shape[:-1] and pixels.dtype == torch.uint8
    of_tower = tower_preprocessing(VisionConfig('test_efficientnet', False, image_size=32))
    floats = {**batch, 'text_embedding': vectors_of(batch),
              'pixel_values': normalize(pixels, of_tower.mean, of_tower.std)}
    del floats['text_embedding_scale']
    expected, found = (_step(DataSpec([one], get_num_samples_in_batch=lambda batch: N, split_batch=data.split_batch,
                                      microbatch_transforms=data.microbatch_transforms), microbatch_size)
                       for one in (floats, batch))
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        assert value.any() and torch.equal(found[name], value), name
