# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The progress bar of a training."""

from typing import Any

from composer.core import State
from composer.loggers import Logger, ProgressBarLogger

__all__ = ['ProgressBar']


class ProgressBar(ProgressBarLogger):
    """Composer's, also for a run that is resumed in the middle of an epoch.

    It has no place in checkpoints.  Composer 0.32.1 keeps the bar's state there, but cannot read it back from a sharded
    one: the run that reads has no bar yet, and asks for other keys.
    """

    def __init__(self) -> None:
        super().__init__('stderr')
        self.hparams_already_logged_to_console = True  # Composer's, which say nothing of the run

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""

    def batch_start(self, state: State, logger: Logger) -> None:
        self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        begins = self.train_pbar is None
        super().epoch_start(state, logger)
        if begins and self.train_pbar is not None:
            bar = self.train_pbar.pbar
            # Those of the run before are not counted as steps of this process, and not in its rate.
            bar.initial = bar.n = int(getattr(state.timestamp, self.train_pbar.timestamp_key))
