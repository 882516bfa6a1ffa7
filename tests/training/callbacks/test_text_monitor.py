# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Padding and cut texts are counted as they are, over microbatches and over a resumption."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip.data.loader import split_by_length
from llm2clip.training.callbacks.text_monitor import TextMonitor


def _batch() -> dict[str, Any]:
    lengths = torch.tensor([1, 4, 2, 8])
    mask = (torch.arange(8) < lengths[:, None]).long()
    return {'index': torch.arange(4), 'query_attention_mask': mask, 'query_cut': torch.tensor([0, 0, 3, 1])}


def _metrics(monitor: Any, batch: dict[str, Any], microbatches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """After two steps and one reading."""
    whole = SimpleNamespace(batch=batch)
    for _ in range(2):
        monitor.after_dataloader(whole, None)
        for part in microbatches:
            monitor.before_forward(SimpleNamespace(batch=part), None)
    return monitor.report(monitor.measure(whole), whole)


def test_shares_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    monitor, metrics = TextMonitor(16), {}
    for microbatch_size, padding in ((4, 1 - 15 / 32), (2, 1 - 15 / (2 * 8 + 2 * 2))):
        metrics = _metrics(monitor, _batch(), split_by_length(_batch(), microbatch_size))
        assert metrics['data/padding_share'] == pytest.approx(padding)
    assert metrics['data/cut_texts'] == 8 and metrics['data/texts'] == 16 and 'data/equal_pairs' not in metrics
    resumed: Any = TextMonitor(16)
    resumed.load_state_dict(monitor.state_dict())
    resumed.fit_end(None, None)
    assert '8 of 16 texts were longer than text_encoder.max_length=16' in capsys.readouterr().out


def test_samples_that_are_paired_with_themselves_are_counted() -> None:
    ids = {'query_text_id': torch.tensor([3, 5, 7, 9]), 'positive_text_id': torch.tensor([3, 6, 7, 8])}
    batch = {**_batch(), **ids}
    assert _metrics(TextMonitor(16), batch, [batch])['data/equal_pairs'] == 4
