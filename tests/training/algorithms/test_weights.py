# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Averaging the weights changes nothing else."""

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel

from llm2clip.losses.contrastive import clip_loss
from llm2clip.training.algorithms.grad_cache import GradCache
from llm2clip.training.algorithms.weights import EMA, averaged_weights


class Model(ComposerModel):
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


class Losses(Callback):

    def __init__(self) -> None:
        self.found: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.found.append(float(state.total_loss_dict['loss/train/total']))
        with averaged_weights(state):  # as `SaveBest`
            pass


def train(
    folder: Path, save_interval: str, half_life: Optional[str], steps: int = 9, resume: Any = None
) -> list[float]:
    """Train with GradCache in epochs of three steps, and return the losses."""
    generator = torch.Generator().manual_seed(1)
    data = [{'index': i, 'x': torch.randn(6, generator=generator), 'y': torch.randn(6, generator=generator)}
            for i in range(24)]
    model, losses = Model(), Losses()
    trainer = Trainer(
        model=model, optimizers=torch.optim.SGD(model.parameters(), lr=1.0), max_duration=f'{steps}ba', device='cpu',
        train_dataloader=torch.utils.data.DataLoader(data, 8), device_train_microbatch_size=3, callbacks=[losses],
        algorithms=[GradCache(), *([] if half_life is None else [EMA(half_life=half_life)])], progress_bar=False,
        save_folder=str(folder), save_interval=save_interval, save_overwrite=True, load_path=resume)
    trainer.fit()
    saved = torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['model']
    with averaged_weights(trainer.state):  # those of the last checkpoint
        assert torch.equal(model.image.weight, saved['image.weight'])
    return losses.found


@pytest.mark.parametrize(('half_life', 'save_interval'), [
    ('50ba', '2ba'),  # the step after a checkpoint has the trained weights, also in the first pass of GradCache
    ('1ep', '3ba'),   # as has the update at the end of an epoch
])
def test_an_average_does_not_change_the_training(half_life: str, save_interval: str, tmp_path: Path) -> None:
    without = train(tmp_path / 'without', save_interval, None)
    assert train(tmp_path / 'with', save_interval, half_life) == without
    train(tmp_path / 'resumed', save_interval, half_life, steps=6)
    resumed = train(tmp_path / 'resumed', save_interval, half_life, resume=f'{tmp_path}/resumed/latest-rank0.pt')
    assert resumed == without[6:]


def test_buffers_are_averaged_after_a_resumption_within_a_wrapper() -> None:
    """DDP and recomputation put `module.` and the like before names, which checkpoints do not have."""
    average, model = EMA(), torch.nn.BatchNorm1d(2)
    average.load_state_dict({'ema_model': {
        'named_parameters_dict': {name: value.detach() + 1 for name, value in model.named_parameters()},
        'named_buffers_dict': {name: value + 1 for name, value in model.named_buffers()}},
        'ema_weights_active': False, 'ema_started': True})
    wrapped = torch.nn.ModuleDict({'module': model})
    average.shard_average(wrapped)
    assert average.ema_model is not None
    average.ema_model.swap_params(wrapped)
    assert model.running_mean.tolist() == [1, 1] and model.weight.tolist() == [2, 2]
