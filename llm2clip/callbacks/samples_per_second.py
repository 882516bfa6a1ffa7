# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How fast a training is, in its progress bar."""

import re
from collections import deque

from composer.core import Callback, State
from composer.loggers import Logger, ProgressBarLogger

__all__ = ['SamplesPerSecond']


class SamplesPerSecond(Callback):
    """Show ``samples/s`` of all ranks together behind the loss, of the last steps and without evaluations.

    Args:
        steps: How many.
    """

    def __init__(self, steps: int = 20) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=steps + 1)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._see(state)

    def _see(self, state: State) -> None:
        self._seen.append((state.timestamp.total_wct.total_seconds(), state.timestamp.sample.value))

    def batch_end(self, state: State, logger: Logger) -> None:
        self._see(state)
        (start, before), (end, now) = self._seen[0], self._seen[-1]
        for destination in logger.destinations:
            if isinstance(destination, ProgressBarLogger) and destination.train_pbar is not None and end > start:
                bar = destination.train_pbar
                bar.metrics['samples/s'] = f'{(now - before) / (end - start):,.0f}'
                # Makes room in the 120 columns that Composer takes where there is no terminal.
                bar.pbar.bar_format = re.sub(' {5,}', ' ', bar.pbar.bar_format).replace('{bar:25}', '{bar:10}')
                bar.pbar.set_postfix(bar.metrics, refresh=False)
