# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Log metrics as lines of JSON, which survive kills and are easy to plot."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional, Union

from composer.core import State
from composer.loggers import Logger, LoggerDestination

from llm2clip.io.files import atomic_write, writing
from llm2clip.ranks import is_first

METRICS_FILE = 'metrics.jsonl'


class JSONLLogger(LoggerDestination):
    """Write the metrics of each step as a line of a file, on rank 0: ``{"step": …, "<metric>": …, …}``.

    The line of a step is written when the step has ended, and again with the metrics that follow, before a
    checkpoint is.  So a kill loses those of the current step alone.  A resumed run continues the same file.
    Its first metric removes those after the checkpoint, so a start that is refused changes nothing.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        self._begins_at: Optional[int] = None  # number of batches of the loaded checkpoint, on rank 0 alone
        self._file: Any = None
        self._record: dict[str, Any] = {}  # empty until the first metric opens the file
        self._start = 0  # byte offset of the current step's line

    def after_load(self, state: State, logger: Logger) -> None:
        if is_first():
            self._begins_at = state.timestamp.batch.value

    def _open(self, step: int) -> None:
        """Open the file behind the metrics that were logged before the checkpoint of `step` batches."""
        # Keep metrics of step n that were logged before the checkpoint of n batches, such as an evaluation,
        # since they are not logged again.  The loss of step n is, and replaces the one here.
        records: dict[int, dict[str, Any]] = {}
        if step > 0:
            records = {record['step']: record for record in _read_records(self.path)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._record = records.pop(step, {'step': step})
        earlier = sorted(records.keys() & range(step))
        with atomic_write(self.path) as partial:
            partial.write_bytes(b''.join(_line(records[n]) for n in earlier))
        self._file = self.path.open('r+b', buffering=0)
        self._start = self._file.seek(0, 2)
        self._write()

    def log_metrics(self, metrics: dict[str, Any], step: Optional[int] = None) -> None:
        if self._begins_at is None:
            return
        if not self._record:
            self._open(self._begins_at)
        if step != self._record['step']:
            self._write()
            self._start = self._file.seek(0, 2)
            self._record = {'step': step}
        self._record.update({name: float(value) for name, value in metrics.items()})

    def batch_end(self, state: State, logger: Logger) -> None:
        self._write()

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._write()

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write()

    def _write(self) -> None:
        if len(self._record) > 1:
            with writing(self.path):
                self._file.seek(self._start)
                self._file.write(_line(self._record))
                self._file.truncate()

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._write()
            self._file.close()
        self._begins_at = self._file = None


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b'\n'


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, none if it does not exist; damaged lines are skipped."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


def read_metrics(path: Union[str, Path]) -> dict[str, dict[int, float]]:
    """Read the metrics that `JSONLLogger` wrote: metric -> step -> value."""
    metrics: dict[str, dict[int, float]] = {}
    for record in _read_records(Path(path)):
        step = record.pop('step')
        for name, value in record.items():
            metrics.setdefault(name, {})[step] = value
    return metrics
