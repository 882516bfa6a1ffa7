# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Small trainings of both stages."""

from pathlib import Path

import pytest
from launched import COMMON


@pytest.fixture
def stage1_args(image_dataset: Path, llm_folder: Path) -> list[str]:
    return [*COMMON, f'text_encoder.pretrained={llm_folder}', 'text_encoder.max_length=32', 'symmetric=true',
            f'train_data.streams.s.local={image_dataset}', 'lora.r=4', 'lora.lora_dropout=0.0', 'optimizer.lr=0.05',
            'train_data.pairs=[{query: [short, long], positive: [short, long]}]']


@pytest.fixture
def stage2_args(image_dataset: Path, sidecar: Path) -> list[str]:
    streams = [f'{data}.streams.s.{key}={value}' for data in ('train_data', 'eval_data')
               for key, value in (('local', image_dataset), ('embeddings.tiny.local', sidecar))]
    return [*COMMON, *streams, 'model.vision.name=test_efficientnet', 'model.vision.image_size=32',
            'model.adapter.depth=1', 'model.embed_dim=16', 'optimizer.lr=0.05', 'eval_interval=3ba',
            'train_data.caption_mix={short: 0.5, long: 0.5}', 'eval_data.caption_mix={short: 1.0}',
            'eval_data.num_workers=0', 'global_eval_batch_size=8']
