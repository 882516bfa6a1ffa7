# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""One line per step, which is there at once."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from composer.core import Timestamp

from llm2clip.training.callbacks.jsonl_logger import JSONLLogger


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
