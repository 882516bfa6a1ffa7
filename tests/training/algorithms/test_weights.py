# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Averaging the weights changes nothing else."""

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from small_training import train

from llm2clip.training.algorithms.grad_cache import GradCache
from llm2clip.training.algorithms.weights import EMA, averaged_weights


class Losses(Callback):

    def __init__(self) -> None:
        self.found: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.found.append(float(state.total_loss_dict['loss/train/total']))
        with averaged_weights(state):  # as `SaveBest`
            pass


def losses(
    folder: Path, save_interval: str, half_life: Optional[str], steps: int = 9, resume: Any = None
) -> list[float]:
    """Train with GradCache in epochs of three steps, and return the losses."""
    found = Losses()
    algorithms = [GradCache()] if half_life is None else [GradCache(), EMA(half_life=half_life)]
    trainer = train(folder, steps, algorithms=algorithms, callbacks=[found], device_train_microbatch_size=3,
                    save_interval=save_interval, load_path=resume)
    saved = torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['model']
    with averaged_weights(trainer.state):  # those of the last checkpoint
        assert torch.equal(trainer.state.model.image.weight, saved['image.weight'])
    return found.found


@pytest.mark.parametrize(('half_life', 'save_interval'), [
    ('50ba', '2ba'),  # the step after a checkpoint has the trained weights, also in the first pass of GradCache
    ('1ep', '3ba'),   # as has the update at the end of an epoch
])
def test_an_average_does_not_change_the_training(half_life: str, save_interval: str, tmp_path: Path) -> None:
    without = losses(tmp_path / 'without', save_interval, None)
    assert losses(tmp_path / 'with', save_interval, half_life) == without
    losses(tmp_path / 'resumed', save_interval, half_life, steps=6)
    resumed = losses(tmp_path / 'resumed', save_interval, half_life, resume=f'{tmp_path}/resumed/latest-rank0.pt')
    assert resumed == without[6:]


def test_averages_resume_within_wrappers() -> None:
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
