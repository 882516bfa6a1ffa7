# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The progress bar of a training, with its speed."""

import re
from collections import deque
from typing import Any

from composer.core import State
from composer.loggers import Logger, ProgressBarLogger

__all__ = ['ProgressBar']

_STEPS = 20


class ProgressBar(ProgressBarLogger):
    """Composer's, with ``samples/s`` behind the loss: of all ranks in the last 20 steps, without evaluations.

    It has no place in checkpoints.  Composer 0.32.1 keeps the bar's state there, but cannot read it back from a sharded
    one: the run that reads has no bar yet, and asks for other keys.
    """

    def __init__(self) -> None:
        super().__init__('stderr')
        self.hparams_already_logged_to_console = True  # Composer's, which say nothing of the run
        self._seen: deque[tuple[float, int]] = deque(maxlen=_STEPS + 1)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.show_pbar and self.train_pbar is None:  # resumed in the middle of an epoch
            self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        begun = self.train_pbar is None
        super().epoch_start(state, logger)
        if begun and self.train_pbar is not None:
            bar = self.train_pbar.pbar
            # Not counted as steps of this process, and not in its rate.
            bar.initial = bar.n = int(getattr(state.timestamp, self.train_pbar.timestamp_key))
            # Makes room in the 120 columns that Composer takes where there is no terminal.
            bar.bar_format = re.sub(' {5,}', ' ', bar.bar_format).replace('{bar:25}', '{bar:10}')
        if not self._seen:
            self._see(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._see(state)
        (start, before), (end, now) = self._seen[0], self._seen[-1]
        if self.train_pbar is not None and end > start:
            self.train_pbar.metrics['samples/s'] = f'{(now - before) / (end - start):,.0f}'
            self.train_pbar.pbar.set_postfix(self.train_pbar.metrics, refresh=False)
        super().batch_end(state, logger)

    def _see(self, state: State) -> None:
        self._seen.append((state.timestamp.total_wct.total_seconds(), state.timestamp.sample.value))
