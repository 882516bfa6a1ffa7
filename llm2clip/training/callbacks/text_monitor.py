# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How many texts were seen, and how many of them were cut off."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.data.loader import text_sides

__all__ = ['TextMonitor']


class TextMonitor(Callback):
    """Log how many texts there were since the beginning (``data/texts``), and how many of them were cut off
    (``data/cut_texts``).

    Of pairs also ``data/equal_pairs`` since the last reading, whose query and positive are one text.

    Args:
        max_length: For the message at the end.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.texts = 0
        self.cut = 0
        self._seen: Counter[str] = Counter()
        """By this rank, since the last reading."""

    def state_dict(self) -> dict[str, Any]:
        return {'texts': self.texts, 'cut': self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts, self.cut = state['texts'], state['cut']

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Count while the batch is on the host."""
        batch, sides = state.batch, text_sides(state.batch)
        for side in sides:
            self._seen['cut'] += int((batch[f'{side}cut'] > 0).sum())
        self._seen['texts'] += len(sides) * len(batch['index'])
        if 'positive_text_id' in batch:
            self._seen['equal'] += int((batch['query_text_id'] == batch['positive_text_id']).sum())

    def measure(self, state: State) -> dict[str, Any]:
        seen = {name: self._seen[name] for name in ('cut', 'texts', 'equal')}
        self._seen.clear()
        return seen

    def report(self, values: Mapping[str, Any], state: State) -> Mapping[str, float]:
        total = {name: round(value * dist.get_world_size()) for name, value in values.items()}
        self.cut, self.texts = self.cut + total['cut'], self.texts + total['texts']
        return {'data/cut_texts': self.cut, 'data/texts': self.texts,
                **({'data/equal_pairs': total['equal']} if 'positive_text_id' in state.batch else {})}

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.cut and dist.get_global_rank() == 0:
            print(f'{self.cut} of {self.texts} texts were longer than text_encoder.max_length={self.max_length} tokens '
                  'and were cut', flush=True)
