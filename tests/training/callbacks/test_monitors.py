# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A broken batch or step stops the training before a checkpoint is written; texts are counted; best values are kept."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, Event, State
from composer.loggers import InMemoryLogger, Logger
from composer.utils import get_device
from small_training import make_batches, train
from torch.utils.data import DataLoader

from llm2clip.io.tensors import read_safetensors
from llm2clip.training.algorithms.grad_cache import GradCache
from llm2clip.training.callbacks import monitors
from llm2clip.training.callbacks.jsonl_logger import JSONLLogger, read_metrics
from llm2clip.training.callbacks.monitors import NonfiniteError, SaveBest, StepMonitor, StopAtNonfinite, TextMonitor
from llm2clip.training.runs import BEST_FILE


@pytest.mark.parametrize('cached', [False, True])
def test_a_nonfinite_loss_names_step_and_samples(tmp_path: Path, cached: bool) -> None:
    batches = make_batches()
    batches[2]['x'][1] = torch.nan
    with pytest.raises(NonfiniteError, match=r"loss of step 2 is nan; .*not finite: \['s21'\]$"):
        monitor = StepMonitor()
        algorithms = [GradCache(), monitor] if cached else [monitor]
        train(tmp_path, batches=batches, callbacks=[StopAtNonfinite(monitor)], algorithms=algorithms,
              device_train_microbatch_size=3 if cached else 8)
    assert {path.name for path in tmp_path.glob('ep*')} == {'ep0-ba1-rank0.pt', 'ep0-ba2-rank0.pt'}


def test_nonfinite_weights_never_reach_a_checkpoint(tmp_path: Path) -> None:
    monitor = StepMonitor()
    with pytest.raises(NonfiniteError, match='step 0 made weights that are not finite'):
        train(tmp_path, lr=float('inf'), callbacks=[StopAtNonfinite(monitor)], algorithms=[monitor])
    assert not [*tmp_path.glob('ep*')]


def test_metrics_of_a_step_are_in_the_file_before_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / 'metrics.jsonl'
    seen: list[dict[str, dict[int, float]]] = []

    class Reader(Callback):
        def eval_end(self, state: State, logger: Logger) -> None:
            logger.log_metrics({'evaluated': 1.0})

        def batch_checkpoint(self, state: State, logger: Logger) -> None:
            seen.append(read_metrics(file))

    held_out = DataLoader([0], batch_size=1, collate_fn=lambda _: make_batches()[0])
    train(tmp_path, callbacks=[Reader()], algorithms=[StepMonitor()], loggers=[JSONLLogger(file)],
          eval_dataloader=held_out, eval_interval='2ba')
    assert len(seen) == 3
    for step, metrics in enumerate(seen, 1):
        assert list(metrics['loss/train/total']) == list(metrics['weight_norm']) == list(range(step))
    assert [[*metrics.get('evaluated', {})] for metrics in seen] == [[], [2], [2]]


@pytest.mark.parametrize('per_parameter', [False, True])
def test_norms_of_gradients_are_those_before_clipping(tmp_path: Path, per_parameter: bool) -> None:
    norms = []
    for algorithms in ([], [GradientClipping('norm', 1e-3)]):
        logged = InMemoryLogger()
        algorithms = [*algorithms, StepMonitor(per_parameter)]
        model = train(tmp_path, 1, 0.0, algorithms=algorithms, loggers=[logged]).state.model
        norms.append({name: values[0][1] for name, values in logged.data.items() if name.startswith('gradient_norm')})
    assert norms[0] == norms[1] and norms[0]['gradient_norm'] > 1e-2
    parts = {name: norm for name, norm in norms[0].items() if '/' in name}
    assert set(parts) == {f'gradient_norm/{name}' for name, _ in model.named_parameters() if per_parameter}
    if per_parameter:
        assert math.hypot(*parts.values()) == pytest.approx(norms[0]['gradient_norm'])


@pytest.mark.parametrize(('wait', 'warns'), [(0.09, False), (0.13, True)])
def test_waiting_for_data_is_warned_of_once(wait: float, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(monitors, 'time', SimpleNamespace(monotonic=lambda: now))
    monitor, state = StepMonitor(), SimpleNamespace(model=torch.nn.Identity())
    logged: Any = SimpleNamespace(log_metrics=lambda metrics: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for step in range(300):
            for event, seconds in ((Event.BEFORE_DATALOADER, wait if step else 60.0), (Event.AFTER_DATALOADER, 0.9)):
                monitor.apply(event, state, logged)  # pyright: ignore[reportArgumentType]
                now += seconds
    assert [str(warning.message).split(':')[0] for warning in caught] == ['train_data.num_workers'] * warns


def test_cut_texts_are_counted_over_a_resumption(capsys: pytest.CaptureFixture[str]) -> None:
    batch: dict[str, Any] = {
        'index': torch.arange(4), 'query_input_ids': torch.ones(4, 8), 'query_cut': torch.tensor([0, 0, 3, 1]),
        'query_text_id': torch.tensor([3, 5, 7, 9]), 'positive_text_id': torch.tensor([3, 6, 7, 8])}
    state: Any = SimpleNamespace(batch=batch, device=get_device('cpu'))
    monitor, logged, resumed = TextMonitor(16), {}, TextMonitor(16)
    for _ in range(4):
        monitor.after_dataloader(state, SimpleNamespace(log_metrics=logged.update))  # pyright: ignore[reportArgumentType]
    assert logged == {'data/cut_texts': 8, 'data/texts': 16, 'data/equal_pairs': 2}
    resumed.load_state_dict(monitor.state_dict())
    resumed.fit_end(state, state)
    assert '8 of 16 texts were longer than text_encoder.max_length=16' in capsys.readouterr().out


def test_the_best_weights_of_the_last_evaluation_stay(tmp_path: Path) -> None:
    """No checkpoint knows its value; on a new machine, where the file is not, the value of a checkpoint is nothing."""
    state: Any = SimpleNamespace(dataloader_label='eval', model=torch.nn.Linear(1, 1))
    logger: Any = SimpleNamespace(log_metrics=lambda metrics: None)

    def evaluate(callback: SaveBest, value: float) -> float:
        state.eval_metrics = {'eval': {callback.metric: SimpleNamespace(compute=lambda: value)}}
        callback.eval_end(state, logger)
        return float(read_safetensors(tmp_path / BEST_FILE).metadata['eval/retrieval_recall@10'])

    callback = SaveBest(folder=str(tmp_path))
    assert evaluate(callback, 60.0) == 60.0
    saved = callback.state_dict()
    assert evaluate(callback, 61.5) == 61.5
    moved, resumed = SaveBest(folder=str(tmp_path / 'new')), SaveBest(folder=str(tmp_path))
    for callback in (moved, resumed):
        callback.load_state_dict(saved)
    assert (moved.best, resumed.best) == (None, 60.0)
    assert evaluate(resumed, 60.5) == 61.5 and resumed.best == 60.5
    assert evaluate(resumed, 62.0) == 62.0
