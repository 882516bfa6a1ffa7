# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Keep the weights that did best in evaluation."""

import shutil
from pathlib import Path
from typing import Any, Optional

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

__all__ = ['SaveBest']


class SaveBest(Callback):
    """Write the model's weights to `best/` when a metric is higher than ever before; logs ``best/<metric>``.

    A run that is resumed goes on from the best value so far.

    Args:
        metric: Name of an evaluation metric.
        folder: Receives `best/`; the trainer's builder puts the run's folder here.
    """

    def __init__(self, metric: str = 'retrieval_recall@10', folder: Optional[str] = None) -> None:
        self.metric, self.folder = metric, folder
        self.best: Optional[float] = None

    def state_dict(self) -> dict[str, Any]:
        return {'best': self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state['best']

    def eval_end(self, state: State, logger: Logger) -> None:
        assert state.dataloader_label is not None
        value = float(state.eval_metrics[state.dataloader_label][self.metric].compute())
        if self.best is not None and value <= self.best:
            return
        self.best = value
        logger.log_metrics({f'best/{self.metric}': value})
        assert self.folder is not None
        folder, partial = Path(self.folder, 'best'), Path(self.folder, 'best.tmp')
        save_checkpoint(state, str(partial / 'weights-rank{rank}.pt'), weights_only=True)
        dist.barrier()
        if dist.get_global_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        dist.barrier()
