# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the metrics of an evaluation during training share: the rows of all batches and ranks."""

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ['Collected']


class Collected(Metric):
    """Rows gathered over batches and ranks; a sample that padding delivered twice counts once."""

    full_state_update = False
    names: tuple[str, ...] = ()
    index: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in (*self.names, 'index'):
            self.add_state(name, default=[], dist_reduce_fx='cat')

    def append(self, index: torch.Tensor, *rows: torch.Tensor) -> None:
        """Add a batch: which samples they are, ``(B,)``, and what `names` stand for, ``(B, …)`` each."""
        for name, value in zip(('index', *self.names), (index, *rows)):
            getattr(self, name).append(value.detach())

    def rows(self) -> list[torch.Tensor]:
        """What `names` stand for, of all samples, in their order."""
        index = dim_zero_cat(self.index)
        order = index.argsort(stable=True)
        ordered = index[order]
        keep = order[torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])]
        return [dim_zero_cat(getattr(self, name))[keep] for name in self.names]
