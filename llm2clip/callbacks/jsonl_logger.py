# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A run's metrics as lines of JSON, which survive kills and are easy to plot."""

import json
from pathlib import Path
from typing import Any, Optional, Union

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

__all__ = ['JSONLLogger', 'read_metrics']


class JSONLLogger(LoggerDestination):
    """Append every metric to a file on rank 0, a line a call: ``{"step": …, "<metric>": …}``.

    Args:
        path: The file; a resumed run goes on in it.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        self._file: Optional[Any] = None

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open('a', buffering=1)

    def log_metrics(self, metrics: dict[str, Any], step: Optional[int] = None) -> None:
        if self._file is not None:
            numbers = {name: float(value) for name, value in metrics.items()}
            self._file.write(json.dumps({'step': step, **numbers}) + '\n')

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Union[str, Path]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value.

    A step that was repeated after a kill has its last value; a line that a kill cut short is left out.
    """
    metrics: dict[str, dict[int, float]] = {}
    if not Path(path).is_file():
        return metrics
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.pop('step')
        for name, value in record.items():
            metrics.setdefault(name, {})[step] = value
    return metrics
