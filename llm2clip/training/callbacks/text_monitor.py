# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How much of the text is padding, and how much was cut off."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.data.loader import text_sides

__all__ = ['TextMonitor']


class TextMonitor(Callback):
    """Log ``data/padding_share`` of this batch's tokens, and ``data/cut_texts`` and ``data/texts`` since the beginning.

    Of pairs also ``data/equal_pairs`` of this batch, whose query and positive are one text.

    Args:
        max_length: For the message at the end.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.texts = 0
        self.cut = 0
        self._real = torch.zeros(1)
        self._slots = 0

    def state_dict(self) -> dict[str, Any]:
        return {'texts': self.texts, 'cut': self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts, self.cut = state['texts'], state['cut']

    def before_forward(self, state: State, logger: Logger) -> None:
        for side in text_sides(state.batch):
            mask = state.batch[f'{side}attention_mask']
            self._real = self._real.to(mask.device) + mask.sum()
            self._slots += mask.numel()

    def batch_end(self, state: State, logger: Logger) -> None:
        sides = text_sides(state.batch)
        cut = sum(int((state.batch[f'{side}cut'] > 0).sum()) for side in sides)
        paired = 'positive_text_id' in state.batch
        equal = int((state.batch['query_text_id'] == state.batch['positive_text_id']).sum()) if paired else 0
        counts = torch.tensor([cut, len(sides) * len(state.batch['index']), int(self._real), self._slots, equal])
        counts = state.device.tensor_to_device(counts)
        dist.all_reduce(counts)
        cut, texts, real, slots, equal = counts.tolist()
        self.cut, self.texts = self.cut + cut, self.texts + texts
        self._real, self._slots = torch.zeros(1), 0
        logger.log_metrics({'data/padding_share': 1 - real / slots, 'data/cut_texts': self.cut,
                            'data/texts': self.texts, **({'data/equal_pairs': equal} if paired else {})})

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.cut and dist.get_global_rank() == 0:
            print(f'{self.cut} of {self.texts} texts were longer than text_encoder.max_length={self.max_length} tokens '
                  'and were cut', flush=True)
