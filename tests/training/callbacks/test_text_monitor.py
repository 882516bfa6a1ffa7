# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Cut texts are counted as they are, also over a resumption."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.utils import get_device

from llm2clip.training.callbacks.monitors import TextMonitor


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
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
