# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Resume dropout where it was."""

from typing import Any, Optional

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility

__all__ = ['ResumeRandomState']


class ResumeRandomState(Callback):
    """Load a checkpoint's random state before the first batch after a resumption.

    Composer 0.32.1 loads it at the start of an epoch and while it replays batches, but not when the dataset itself
    resumes in the middle of an epoch, as Streaming's does: dropout would go on with other masks.

    Args:
        rng_state: One state per rank, as the Trainer read them.
    """

    def __init__(self, rng_state: list[dict[str, Any]]) -> None:
        self._rng_state: Optional[list[dict[str, Any]]] = rng_state

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._rng_state is not None:
            reproducibility.load_rng_state(self._rng_state)
            self._rng_state = None
