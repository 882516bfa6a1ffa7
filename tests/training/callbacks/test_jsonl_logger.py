# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""One line per step, which is there at once."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from composer.core import Timestamp

from llm2clip.training.callbacks.jsonl_logger import JSONLLogger, read_metrics


def _logger(path: Path, batch: int) -> JSONLLogger:
    logger = JSONLLogger(path)
    logger.after_load(Mock(timestamp=Timestamp(batch=batch)), Mock())
    return logger


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_is_in_the_line_of_its_step_at_once(tmp_path: Path) -> None:
    path = tmp_path / 'run/metrics.jsonl'
    logger = _logger(path, 0)
    assert _lines(path) == []
    logger.log_metrics({'wait': 0.12345678}, 0)
    assert _lines(path) == [{'step': 0, 'wait': 0.12345678}]
    logger.log_metrics({'loss': 2.5, 'wait': 1}, 0)
    assert _lines(path) == [{'step': 0, 'wait': 1.0, 'loss': 2.5}]
    logger.log_metrics({'loss': 2.0}, 1)
    assert _lines(path) == [{'step': 0, 'wait': 1.0, 'loss': 2.5}, {'step': 1, 'loss': 2.0}]


def test_a_resumed_run_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 0, "loss": 3}\n{"step": 1, "scale": 10, "loss": 2}\n'
                    '{"step": 2, "scale": 20, "loss": 1}\n{"step": 3, "loss": 0}\n{"step": 4, "sc')  # killed in a line
    before = read_metrics(path)
    assert before == {'loss': {0: 3, 1: 2, 2: 1, 3: 0}, 'scale': {1: 10, 2: 20}}
    logger = _logger(path, 2)
    assert _lines(path) == [{'step': 0, 'loss': 3}, {'step': 1, 'scale': 10, 'loss': 2},
                            {'step': 2, 'scale': 20, 'loss': 1}]
    logger.log_metrics({'loss': 1.5}, 2)
    logger.log_metrics({'loss': 0.5}, 3)
    assert _lines(path)[2:] == [{'step': 2, 'scale': 20, 'loss': 1.5}, {'step': 3, 'loss': 0.5}]
    _logger(path, 0)
    assert _lines(path) == []
