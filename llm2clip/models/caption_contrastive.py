# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 as a Composer model: contrastive fine-tuning of a text encoder on pairs of captions."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torchmetrics import Metric

from llm2clip.losses.contrastive import ignored_candidates, info_nce
from llm2clip.metrics.retrieval import CaptionRetrievalAccuracy
from llm2clip.modeling.text_encoder import TextEncoder
from llm2clip.models.model_with_metrics import ModelWithMetrics
from llm2clip.models.sharding import save_trainable_only

Batch = dict[str, Any]
Outputs = dict[str, torch.Tensor]


class _LogitScale(nn.Module):
    """Factor on the cosine similarities, in log space; a module, so that it becomes an FSDP2 unit."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(scale)))

    def forward(self, anything: torch.Tensor) -> torch.Tensor:
        """Return the parameter, ``(1,)``.  On GPUs, FSDP2 of torch 2.7 requires the unused input."""
        return self.logit_scale.clone()


class CaptionContrastive(ModelWithMetrics):
    """Contrastive fine-tuning of a text encoder.

    A batch holds the samples' ``index`` ``(B,)`` and ``query_*`` and ``positive_*`` tensors: `input_ids`,
    `attention_mask`, `embed_mask`, each ``(B, T)``, and `text_id` ``(B,)``, equal for equal texts, and 0
    where a text is absent: a negative or, in evaluation, any text.  Data with hard negatives adds
    ``negative_*``.  In training, `split_packed` packs the texts of all sides into one row for a single
    forward pass.

    Args:
        logit_scale, learn_logit_scale: The factor on the cosine similarities, and whether it is trained.
        symmetric: Whether to average the loss with the loss from positive to query.
        mask_equal_texts: Whether samples that share a text are excluded as negatives of each other.
    """

    feature_names = ('query', 'positive', 'negative')
    metrics = {'cra': CaptionRetrievalAccuracy}

    def __init__(
        self, text_encoder: TextEncoder, logit_scale: float = 50.0, learn_logit_scale: bool = False,
        symmetric: bool = False, mask_equal_texts: bool = True,
    ) -> None:
        super().__init__()
        save_trainable_only(self)
        self.text_encoder = text_encoder
        self.logit_scale = logit_scale
        self.scale = _LogitScale(logit_scale) if learn_logit_scale else None
        self.symmetric = symmetric
        self.mask_equal_texts = mask_equal_texts

    def forward(self, batch: Batch) -> Outputs:
        """Return the embeddings of each side, ``(B, llm_embed_dim)``, and ``logit_scale`` if it is
        trained."""
        sides = [side for side in self.feature_names if f'{side}_text_id' in batch]
        if 'runs' in batch:
            vectors = self.text_encoder(**TextEncoder.arguments(batch))
            outputs = dict(zip(sides, vectors.chunk(len(sides))))
        else:
            # Evaluation batches are not packed; torch 2.7 cannot compile layers with an attention mask.
            with torch.compiler.set_stance('force_eager'):
                outputs = {side: self.text_encoder(**TextEncoder.arguments(batch, f'{side}_'))
                           for side in sides}
        if self.scale is not None:
            outputs['logit_scale'] = self.scale(batch['index'])
        return outputs

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, *_: Any) -> torch.Tensor:
        """Return this rank's part of the loss; the mean over ranks is the loss of the global batch."""
        ids = {side: batch[f'{side}_text_id'].to(outputs[side].device)
               for side in self.feature_names if side in outputs}
        ignored = ignored_candidates(ids['query'], ids['positive'], ids.get('negative'),
                                     self.mask_equal_texts)
        scale = self.logit_scale
        if 'logit_scale' in outputs:
            scale = outputs['logit_scale'].exp()
        return info_nce(outputs['query'], outputs['positive'], outputs.get('negative'), scale=scale,
                        symmetric=self.symmetric, ignored=ignored)

    def update_metric(self, batch: Batch, outputs: Outputs, metric: Metric) -> None:
        has_both = (batch['query_text_id'] != 0) & (batch['positive_text_id'] != 0)
        metric.update(outputs['query'], outputs['positive'], batch['index'], has_both)
