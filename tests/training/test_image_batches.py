# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2's batches in Composer's loop: int8 vectors and uint8 pixels become floats on the way to the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parts import make_samples, write_dataset, write_text_embeddings

from llm2clip.config import AdapterConfig, DatasetConfig, ImageDataConfig, ImageStreamConfig, ModelConfig, VisionConfig
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.vectors import dequantize
from llm2clip.modeling.image_processing_llm2clip import normalize
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.towers import tower_preprocessing

N = 10

pytestmark = pytest.mark.usefixtures('no_leftovers')


@pytest.mark.parametrize('captions', [1, 2])
def test_integer_batches_give_the_loss_of_their_floats(
    captions: int, teacher_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit, in microbatches as Composer and GradCache make them."""
    write_dataset(make_samples(N), tmp_path)
    write_text_embeddings(tmp_path / 'train', tmp_path / 'embeddings', teacher_folder, storage='int8')
    stream = ImageStreamConfig(str(tmp_path / 'train'),
                               embeddings={'tiny': DatasetConfig(str(tmp_path / 'embeddings'))})
    config = ImageDataConfig(streams={'s': stream}, caption_weights={'short': 1.0, 'long': 1.0}, num_workers=0,
                             num_canonical_nodes=1, captions_per_image=captions)
    data = build_image_loader(config, 32, N, 5, train=True)
    batch: dict[str, Any] = next(iter(data.dataloader))
    values, scale, pixels = batch['text_embedding'], batch['text_embedding_scale'], batch['pixel_values']
    assert values.dtype == torch.int8 and scale.shape == values.shape[:-1] and pixels.dtype == torch.uint8
    of_tower = tower_preprocessing(VisionConfig('test_efficientnet', False, image_size=32))
    floats = {**batch, 'text_embedding': dequantize(batch),
              'pixel_values': normalize(pixels, of_tower.mean, of_tower.std)}
    del floats['text_embedding_scale']
    config = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
    model = ComposerLLM2CLIP(LLM2CLIP(config, 32, load_weights=False))
    parts, expected = (data.split_batch(one, 4) for one in (batch, floats))
    assert [len(part['index']) for part in parts] == [4, 4, 2]
    for part, other in zip(parts, expected):
        part, other = data.microbatch_transforms(part), data.microbatch_transforms(other)
        assert torch.equal(model.loss(model(part), part), model.loss(model(other), other))
