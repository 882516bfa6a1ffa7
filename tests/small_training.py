# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings of a contrastive model with two linear towers."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from composer import DataSpec, Trainer
from composer.models import ComposerModel

from llm2clip.losses.contrastive import clip_loss


class TwoTowers(ComposerModel):
    feature_names = ('image_features', 'text_features')

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {'image_features': F.normalize(self.image(batch['x']), dim=-1),
                'text_features': F.normalize(self.text(batch['y']), dim=-1)}

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return clip_loss(outputs['image_features'], outputs['text_features'], torch.tensor([2.0]))


def make_batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{'index': torch.arange(8), 'sample_id': [f's{step}{i}' for i in range(8)],
             'x': torch.randn(8, 6, generator=generator), 'y': torch.randn(8, 6, generator=generator)}
            for step in range(3)]


def train(folder: Path, steps: int = 3, lr: float = 1.0, **options: Any) -> Trainer:
    """Train with Composer's Trainer and its `options`, and a checkpoint after each step."""
    model = TwoTowers()
    data = DataSpec(options.pop('batches', make_batches()), get_num_samples_in_batch=lambda batch: len(batch['index']))
    trainer = Trainer(**{
        'model': model, 'train_dataloader': data, 'optimizers': torch.optim.SGD(model.parameters(), lr=lr),
        'max_duration': f'{steps}ba', 'device': 'cpu', 'precision': 'fp32', 'progress_bar': False, 'run_name': 'test',
        'save_folder': str(folder), 'save_interval': '1ba', 'save_overwrite': True,
        'device_train_microbatch_size': 8, **options})
    trainer.fit()
    return trainer
