# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The training loop against Composer's: the same training, but no value is read between two readings."""

from types import SimpleNamespace
from typing import Any, Optional

import composer
import pytest
import torch
from composer import Algorithm, Callback, DataSpec
from composer.algorithms import GradientClipping
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.models import ComposerModel
from torch.utils._python_dispatch import TorchDispatchMode

import llm2clip.training.loop
from llm2clip.losses.contrastive import clip_loss
from llm2clip.training.algorithms.clamp_logit_scale import ClampLogitScale
from llm2clip.training.algorithms.step_monitor import StepMonitor
from llm2clip.training.callbacks.in_batch_accuracy import InBatchAccuracy
from llm2clip.training.callbacks.logit_scale_monitor import LogitScaleMonitor
from llm2clip.training.callbacks.nonfinite import StopAtNonfinite
from llm2clip.training.loop import Trainer, host_group
from llm2clip.training.readings import Readings

STEPS = 7


class _Model(ComposerModel):

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)
        self.logit_scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        features = (torch.nn.functional.normalize(f(batch[x]), dim=-1)
                    for x, f in (('image', self.image), ('text', self.text)))
        return {**dict(zip(('image_features', 'text_features'), features)), 'logit_scale': self.logit_scale.clone()}

    def loss(self, outputs: dict[str, torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
        return clip_loss(outputs['image_features'], outputs['text_features'], outputs['logit_scale'])


class _Reads(TorchDispatchMode):
    """In which steps the host asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.steps: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.step >= 0:
            self.steps.add(self.step)
        return func(*args, **(kwargs or {}))


class _Steps(Callback):
    """Tells `_Reads` which step is run; readings, which come before, are not in it."""

    def __init__(self, reads: _Reads) -> None:
        self.reads = reads

    def batch_start(self, state: State, logger: Logger) -> None:
        self.reads.step = state.timestamp.batch.value

    def fit_end(self, state: State, logger: Logger) -> None:
        self.reads.step = -1


class _Log(LoggerDestination):
    """Metric -> step -> value."""

    def __init__(self) -> None:
        self.data: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: Optional[int] = None) -> None:
        assert step is not None
        for name, value in metrics.items():
            self.data.setdefault(name, {})[step] = value


def _batches() -> DataSpec:
    torch.manual_seed(1)
    batches = [{'index': torch.arange(8), 'sample_id': [f'{i}' for i in range(8)], 'image': torch.randn(8, 6),
                'text': torch.randn(8, 5)} for _ in range(STEPS)]
    return DataSpec(batches, get_num_samples_in_batch=lambda batch: len(batch['index']),
                    get_num_tokens_in_batch=lambda batch: 3 * len(batch['index']))


def _fit(ours: bool, microbatch: int = 8, log_interval: str = '3ba') -> tuple[State, _Log, _Reads]:
    reads, logged = _Reads(), _Log()
    model, readings = _Model(), Readings(log_interval)
    algorithms: list[Algorithm] = [ClampLogitScale(), GradientClipping('norm', 0.1)]
    callbacks: list[Callback] = [_Steps(reads)]
    if ours:
        algorithms.append(StepMonitor())
        callbacks = [StopAtNonfinite('nowhere'), readings, *callbacks, LogitScaleMonitor(), InBatchAccuracy()]
    trainer = (Trainer if ours else lambda _, **options: composer.Trainer(**options))(
        readings, model=model, train_dataloader=_batches(), algorithms=algorithms, callbacks=callbacks, loggers=logged,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), device_train_microbatch_size=microbatch,
        max_duration='1ep', device='cpu', precision='fp32', seed=3, progress_bar=False)
    with reads:
        trainer.fit()
    trainer.close()
    return trainer.state, logged, reads


@pytest.mark.parametrize('microbatch', [8, 3])
def test_it_trains_as_composers_does(microbatch: int) -> None:
    (ours, logged, _), (theirs, expected, _) = (_fit(which, microbatch, '1ba') for which in (True, False))
    for (name, found), value in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(found, value), name
    assert (ours.timestamp.sample, ours.timestamp.token) == (theirs.timestamp.sample, theirs.timestamp.token)
    assert logged.data['loss/train/total'] == expected.data['loss/train/total']
    assert ours.timestamp.token == 3 * 8 * STEPS and ours.total_loss_dict == theirs.total_loss_dict


def test_nothing_is_read_between_readings() -> None:
    _, logged, reads = _fit(ours=True)
    assert reads.steps == set()
    assert _fit(ours=False)[2].steps == set(range(STEPS))  # by Composer's Trainer
    every = _fit(ours=True, log_interval='1ba')[1]
    for name in ('loss/train/total', 'gradient_norm', 'logit_scale', 'train/image_to_text_accuracy'):
        # After the third and the sixth step, and after the last.
        assert logged.data[name] == {step: every.data[name][step] for step in (2, 5, 6)}
        assert every.data[name].keys() == set(range(STEPS))
    assert logged.data['time/data_wait'].keys() == {2, 5, 6}


def test_one_rank_reduces_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default group is NCCL on a GPU, which refuses as is done here."""
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError('No backend type associated with device type cpu')

    monkeypatch.setattr(llm2clip.training.loop.dist, 'all_reduce', refuse)
    trainer: Any = SimpleNamespace(_hosts=host_group(60))
    assert Trainer._sum(trainer, True, 2.5) == [1.0, 2.5]
