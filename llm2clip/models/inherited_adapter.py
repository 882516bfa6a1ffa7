# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Inheritance: train the adapter to reproduce the text features of CLIP (ProCLIP, arXiv 2510.18795)."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchmetrics import Metric

from llm2clip.losses.distillation import instance_loss, structure_loss
from llm2clip.metrics.retrieval import RetrievalRecall
from llm2clip.modeling.adapter import Adapter
from llm2clip.models.model_with_metrics import ModelWithMetrics

Batch = dict[str, torch.Tensor]


class _TextSide(nn.Module):
    """Text adapter with normalised float32 outputs."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    # Composer only looks up this method on the direct children of a ComposerModel.
    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Shard every block of the adapter as its own FSDP unit, and the adapter as the unit around them."""
        return module is self.adapter or self.is_block(module)

    # Each block is recomputed separately with `fsdp.activation_checkpointing`.
    is_block = activation_checkpointing_fn = staticmethod(Adapter.is_block)

    def fsdp_float32_inputs_fn(self, module: nn.Module) -> bool:
        """Return whether FSDP leaves the dtype of a module's inputs unchanged, as for text embeddings."""
        return module in (self, self.adapter)

    def forward(self, text_embedding: torch.Tensor) -> torch.Tensor:
        """Project text embeddings ``(B, llm_embed_dim)`` to ``(B, embed_dim)``, L2-normalised, in float32."""
        return F.normalize(self.adapter(text_embedding.float()).float(), dim=-1)


class ComposerInheritance(ModelWithMetrics):
    """Training of a text adapter against the text features of CLIP's own tower.

    A batch has one caption per sample: ``text_embedding`` ``(B, llm_embed_dim)`` and its ``target``
    ``(B, embed_dim)``, ``counted`` ``(B,)``, False without a target, and the samples' ``index`` ``(B,)``.

    Args:
        instance: Weight of `instance_loss`, the squared distance between a feature and its target.
        structure: Weight of `structure_loss`, which compares pairwise distances of features and of targets.
        block_size: Rows of the distance matrix that are computed at once.  None: all rows of this rank.
    """

    feature_names = ('text_features',)
    metrics = {'retrieval_recall@10': RetrievalRecall}

    def __init__(
        self, adapter: nn.Module, instance: float = 1.0, structure: float = 1.0,
        block_size: Optional[int] = None
    ) -> None:
        super().__init__()
        self.model = _TextSide(adapter)
        self.instance = instance
        self.structure = structure
        self.block_size = block_size

    def forward(self, batch: Batch) -> Batch:
        """Return the ``text_features`` of this rank's samples."""
        return {'text_features': self.model(batch['text_embedding'])}

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, *_: Any) -> torch.Tensor:
        """Return this rank's part of the loss; the mean over ranks is the loss of the global batch."""
        features = outputs['text_features']
        targets, counted = _targets(batch, features.device)
        return (self.instance * instance_loss(features, targets, counted)
                + self.structure * structure_loss(features, targets, self.block_size, counted))

    def update_metric(self, batch: Batch, outputs: Batch, metric: Metric) -> None:
        """Update the recall of retrieval between features and targets, in both directions."""
        features = outputs['text_features']
        targets, counted = _targets(batch, features.device)
        index = batch['index'].to(features.device)
        text_id = torch.where(counted, index + 1, 0)
        metric.update(targets, features[:, None], index, text_id[:, None])


def _targets(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets ``(B, embed_dim)``, L2-normalised, and the mask ``(B,)`` of samples that have one."""
    targets = batch['target'].to(device).float()
    return F.normalize(targets, dim=-1), batch['counted'].to(device)
