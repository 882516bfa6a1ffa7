# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 as a Composer model: two captions of one thing attract each other."""

from typing import Any, Optional

import torch
from composer.models import ComposerModel
from torchmetrics import Metric

from llm2clip.losses import all_gather, info_nce
from llm2clip.metrics.retrieval import CaptionRetrievalAccuracy
from llm2clip.models.text_encoder import TextEncoder

__all__ = ['CaptionContrastive']

Batch = dict[str, torch.Tensor]


class CaptionContrastive(ComposerModel):
    """Contrastive fine-tuning of a text encoder.

    A batch holds ``query_*`` and ``positive_*`` tensors (`input_ids`, `attention_mask`, `embed_mask`, each ``(B, T)``)
    and the samples' ``index`` ``(B,)``.

    Args:
        text_encoder: The encoder to train.
        loss_scale: Factor on the cosine similarities.
        symmetric: Also from positive to query.
    """

    def __init__(self, text_encoder: TextEncoder, loss_scale: float = 50.0, symmetric: bool = False) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.loss_scale = loss_scale
        self.symmetric = symmetric
        self.val_metrics = {'cra': CaptionRetrievalAccuracy()}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and positive embeddings of this rank, ``(B, llm_embed_dim)`` each."""
        query, positive = (
            self.text_encoder(**{key: batch[f'{side}_{key}'] for key in ('input_ids', 'attention_mask', 'embed_mask')})
            for side in ('query', 'positive'))
        return query, positive

    def loss(self, outputs: tuple[torch.Tensor, torch.Tensor], batch: Batch, *args: Any) -> torch.Tensor:
        """The loss of the global batch, the same on every rank."""
        del batch, args
        query, positive = map(all_gather, outputs)
        return info_nce(query, positive, scale=self.loss_scale, symmetric=self.symmetric)

    def eval_forward(self, batch: Batch, outputs: Optional[Any] = None) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs if outputs is not None else self(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else dict(self.val_metrics)

    def update_metric(self, batch: Batch, outputs: tuple[torch.Tensor, torch.Tensor], metric: Metric) -> None:
        metric.update(*outputs, batch['index'])
