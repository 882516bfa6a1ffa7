# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How many texts were seen, and how many of them were cut off."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.data.loader import text_sides

__all__ = ['TextMonitor']


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
