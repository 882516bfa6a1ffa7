# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Cut texts are counted as they are, also over a resumption."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.utils import get_device

from llm2clip.training.callbacks.monitors import TextMonitor


def _batch() -> dict[str, Any]:
    return {'index': torch.arange(4), 'query_input_ids': torch.ones(4, 8), 'query_cut': torch.tensor([0, 0, 3, 1])}


def _metrics(monitor: Any, batch: dict[str, Any]) -> dict[str, float]:
    """After two steps."""
    logged: dict[str, float] = {}
    state = SimpleNamespace(batch=batch, device=get_device('cpu'))
    for _ in range(2):
        monitor.after_dataloader(state, SimpleNamespace(log_metrics=logged.update))
    return logged


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    monitor, metrics = TextMonitor(16), {}
    for _ in range(2):
        metrics = _metrics(monitor, _batch())
    assert metrics == {'data/cut_texts': 8, 'data/texts': 16}
    resumed: Any = TextMonitor(16)
    resumed.load_state_dict(monitor.state_dict())
    resumed.fit_end(None, None)
    assert '8 of 16 texts were longer than text_encoder.max_length=16' in capsys.readouterr().out


def test_samples_that_are_paired_with_themselves_are_counted() -> None:
    ids = {'query_text_id': torch.tensor([3, 5, 7, 9]), 'positive_text_id': torch.tensor([3, 6, 7, 8])}
    batch = {**_batch(), **ids}
    assert _metrics(TextMonitor(16), batch)['data/equal_pairs'] == 2
