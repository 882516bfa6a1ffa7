# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Padding and cut texts are counted as they are, over microbatches and over a resumption."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU

from llm2clip.data.loader import split_by_length
from llm2clip.training.callbacks.text_monitor import TextMonitor


def _batch() -> dict[str, Any]:
    lengths = torch.tensor([1, 4, 2, 8])
    mask = (torch.arange(8) < lengths[:, None]).long()
    return {'index': torch.arange(4), 'query_attention_mask': mask, 'query_cut': torch.tensor([0, 0, 3, 1])}


def test_shares_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    metrics: dict[str, float] = {}
    logger: Any = SimpleNamespace(log_metrics=metrics.update)
    monitor = TextMonitor(16)
    for microbatch_size, padding in ((4, 1 - 15 / 32), (2, 1 - 15 / (2 * 8 + 2 * 2))):
        for part in split_by_length(_batch(), microbatch_size):
            monitor.before_forward(SimpleNamespace(batch=part), logger)
        state: Any = SimpleNamespace(batch=_batch(), device=DeviceCPU())
        monitor.batch_end(state, logger)
        assert metrics['data/padding_share'] == pytest.approx(padding)
    assert metrics['data/cut_texts'] == 4 and metrics['data/texts'] == 8 and 'data/equal_pairs' not in metrics
    resumed = TextMonitor(16)
    resumed.load_state_dict(monitor.state_dict())
    resumed.fit_end(state, logger)
    assert '4 of 8 texts were longer than text_encoder.max_length=16' in capsys.readouterr().out


def test_samples_that_are_paired_with_themselves_are_counted() -> None:
    metrics: dict[str, float] = {}
    logger: Any = SimpleNamespace(log_metrics=metrics.update)
    ids = {'query_text_id': torch.tensor([3, 5, 7, 9]), 'positive_text_id': torch.tensor([3, 6, 7, 8])}
    monitor, state = TextMonitor(16), SimpleNamespace(batch={**_batch(), **ids}, device=DeviceCPU())
    monitor.before_forward(state, logger)  # type: ignore[arg-type]
    monitor.batch_end(state, logger)  # type: ignore[arg-type]
    assert metrics['data/equal_pairs'] == 2
