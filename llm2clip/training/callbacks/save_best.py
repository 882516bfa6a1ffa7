# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Keep the weights that did best in evaluation."""

from pathlib import Path
from typing import Any, Optional

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from llm2clip.training.algorithms.weights import averaged_weights
from llm2clip.training.runs import BEST_FILE
from llm2clip.weights import write_safetensors

__all__ = ['SaveBest']


class SaveBest(Callback):
    """Write the model's weights to `best.safetensors` when a metric is higher than ever before; logs ``best/<metric>``.

    With `ema`, they are the averaged ones, which were evaluated.  The best value so far is in checkpoints.

    Args:
        metric: Name of an evaluation metric.
        dataloader_label: ``eval``, the evaluation on `eval_data`, or the name of a zero-shot set.
        folder: Receives the file; the trainer's builder puts the run's folder here.
    """

    def __init__(
        self, metric: str = 'retrieval_recall@10', dataloader_label: str = 'eval', folder: Optional[str] = None
    ) -> None:
        self.metric, self.dataloader_label, self.folder = metric, dataloader_label, folder
        self.best: Optional[float] = None

    def state_dict(self) -> dict[str, Any]:
        return {'best': self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state['best']

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.dataloader_label != self.dataloader_label:
            return
        value = float(state.eval_metrics[self.dataloader_label][self.metric].compute())
        if self.best is not None and value <= self.best:
            return
        self.best = value
        logger.log_metrics({f'best/{self.metric}': value})
        assert self.folder is not None
        with averaged_weights(state):
            weights: dict[str, Any] = get_model_state_dict(
                state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if dist.get_global_rank() == 0:
                write_safetensors(Path(self.folder, BEST_FILE), weights)
        dist.barrier()
