# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A broken batch or step is named and stops the training before a checkpoint is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from composer import DataSpec, Trainer
from composer.models import ComposerModel

from llm2clip.training.algorithms.grad_cache import GradCache
from llm2clip.training.callbacks.monitors import NonfiniteError, StopAtNonfinite


class _Model(ComposerModel):
    feature_names = ('a',)

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {'a': self.linear(batch['x'])}

    def loss(self, outputs: dict[str, torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
        return outputs['a'].square().mean()


def _train(folder: Path, broken: bool, lr: float = 0.1, cached: bool = False) -> Trainer:
    """Six steps, of which the third has a broken sample."""
    batches = []
    for step in range(6):
        x = torch.ones(4, 2)
        if broken and step == 2:
            x[1] = torch.nan
        batches.append({'index': torch.arange(4), 'sample_id': [f's{step}{i}' for i in range(4)], 'x': x})
    model = _Model()
    trainer = Trainer(
        model=model, max_duration='6ba', save_interval='1ba',
        train_dataloader=DataSpec(batches, get_num_samples_in_batch=lambda b: len(b['index'])),
        optimizers=torch.optim.SGD(model.parameters(), lr=lr), device='cpu', precision='fp32',
        device_train_microbatch_size=2 if cached else 4, algorithms=[GradCache()] if cached else [],
        callbacks=[StopAtNonfinite()], save_folder=str(folder / 'checkpoints'),
        progress_bar=False)
    trainer.fit()
    return trainer


def _checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / 'checkpoints').glob('ep*')}


@pytest.mark.parametrize('cached', [False, True])
def test_the_step_the_samples_and_the_last_checkpoint_are_named(tmp_path: Path, cached: bool) -> None:
    with pytest.raises(NonfiniteError, match=r"loss of step 2 is nan; .*not finite: \['s21'\]$"):
        _train(tmp_path, broken=True, cached=cached)
    assert _checkpoints(tmp_path) == {'ep0-ba1-rank0.pt', 'ep0-ba2-rank0.pt'}


def test_broken_weights_never_reach_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonfiniteError, match=r"step \d made weights that are not finite"):
        _train(tmp_path, broken=False, lr=3e38)
    assert not _checkpoints(tmp_path)
