# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What is logged of each step beside losses and learning rates."""

import time
from typing import Any, Optional

import composer.callbacks
import torch
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.data.texts import text_sides
from llm2clip.models.sharding import whole

__all__ = ['LogitScaleMonitor', 'SpeedMonitor', 'StepMonitor', 'TextMonitor']


class LogitScaleMonitor(Callback):
    """Log ``logit_scale``, the factor on the cosine similarities, after each step."""

    def batch_end(self, state: State, logger: Logger) -> None:
        for name, parameter in state.model.named_parameters():
            if name.rsplit('.', 1)[-1] == 'logit_scale':
                logger.log_metrics({'logit_scale': whole(parameter).detach().exp().item()})


class SpeedMonitor(composer.callbacks.SpeedMonitor):
    """Composer's, with ``throughput/device/flops_per_sec`` and, on GPUs that Composer knows or with
    `gpu_flops_available`, ``throughput/device/mfu``.

    FLOPs are counted once, before the model is sharded.
    """

    def init(self, state: State, logger: Logger) -> None:
        model: Any = state.model  # of this project, so that it has `batch_flops`
        if (flops := model.batch_flops()) is not None:
            model.flops_per_batch = flops
        super().init(state, logger)


class StepMonitor(Algorithm):
    """Log ``gradient_norm``, the L2 norm of a step's gradients before clipping, those of the other ranks' shards
    included, and ``time/data_wait``, the seconds that the first rank waited for the batch.

    An algorithm and not a callback, since those only run after the algorithms of an event: after the gradients are
    clipped, and after `GradCache` has done its first pass.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        if event == Event.BEFORE_DATALOADER:
            self._start = time.monotonic()
        elif event == Event.AFTER_DATALOADER:
            logger.log_metrics({'time/data_wait': time.monotonic() - self._start})
        else:
            gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
            logger.log_metrics({'gradient_norm': whole(torch.nn.utils.get_total_norm(gradients)).item()})


class TextMonitor(Callback):
    """Log how many texts there were since the beginning (``data/texts``), and how many of them were cut off
    (``data/cut_texts``).

    Of pairs also ``data/equal_pairs`` of the step, whose query and positive are one text.

    Args:
        max_length: For the message at the end.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.texts = 0
        self.cut = 0

    def state_dict(self) -> dict[str, Any]:
        return {'texts': self.texts, 'cut': self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts, self.cut = state['texts'], state['cut']

    def after_dataloader(self, state: State, logger: Logger) -> None:
        batch, sides = state.batch, text_sides(state.batch)
        cut = sum(int((batch[f'{side}cut'] > 0).sum()) for side in sides)
        pairs = 'positive_text_id' in batch
        equal = int((batch['query_text_id'] == batch['positive_text_id']).sum()) if pairs else 0
        seen = state.device.tensor_to_device(torch.tensor([cut, len(sides) * len(batch['index']), equal]))
        dist.all_reduce(seen)
        cut, texts, equal = seen.tolist()
        self.cut, self.texts = self.cut + cut, self.texts + texts
        logger.log_metrics({'data/cut_texts': self.cut, 'data/texts': self.texts,
                            **({'data/equal_pairs': equal} if pairs else {})})

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.cut and dist.get_global_rank() == 0:
            print(f'{self.cut} of {self.texts} texts were longer than text_encoder.max_length={self.max_length} tokens '
                  'and were cut', flush=True)
