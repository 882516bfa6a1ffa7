# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2: vision tower and adapter under the CLIP loss."""

import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.models import ComposerModel
from torchmetrics import Metric

from llm2clip.config import ModelConfig
from llm2clip.losses import all_gather, clip_loss
from llm2clip.metrics.retrieval import RetrievalRecall
from llm2clip.models.adapter import Adapter
from llm2clip.models.vision_encoder import VisionEncoder

__all__ = ['LLM2CLIP', 'ComposerLLM2CLIP']

Batch = dict[str, torch.Tensor]


class LLM2CLIP(nn.Module):
    """Images and teacher vectors in one space.

    Args:
        config: Vision tower, adapter and `embed_dim`.
        llm_embed_dim: Width of the teacher's vectors.
        load_weights: Load the tower's pretrained weights.
    """

    def __init__(self, config: ModelConfig, llm_embed_dim: int, load_weights: bool = True) -> None:
        super().__init__()
        self.vision_encoder = VisionEncoder(config.vision, load_weights)
        self.visual_projection = nn.Linear(self.vision_encoder.width, config.embed_dim, bias=False)
        # Orthogonal rows keep the angles between the pretrained tower's features, so that training starts from its
        # geometry and not from a random one.
        nn.init.orthogonal_(self.visual_projection.weight)
        self.adapter = Adapter(llm_embed_dim, config.embed_dim, config.adapter.depth, config.adapter.expansion)
        # One-dimensional, since FSDP2 cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` -> ``(B, embed_dim)``, L2-normalised."""
        return F.normalize(self.visual_projection(self.vision_encoder(pixel_values)).float(), dim=-1)

    def get_text_features(self, text_embedding: torch.Tensor) -> torch.Tensor:
        """The teacher's vectors ``(…, llm_embed_dim)`` -> ``(…, embed_dim)``, L2-normalised."""
        return F.normalize(self.adapter(text_embedding.float()).float(), dim=-1)

    def forward(
        self, pixel_values: torch.Tensor, text_embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image features, text features, logit scale (log space)."""
        return self.get_image_features(pixel_values), self.get_text_features(text_embedding), self.logit_scale


class ComposerLLM2CLIP(ComposerModel):
    """Stage-2 training.

    A training batch holds ``pixel_values`` ``(B, 3, H, W)`` and ``text_embedding`` ``(B, llm_embed_dim)``; an
    evaluation batch has ``text_embedding`` ``(B, K, llm_embed_dim)`` for K captions an image, their ``text_id``
    ``(B, K)`` and the images' ``index`` ``(B,)``.

    Args:
        model: The two towers.
    """

    feature_names = ('image_features', 'text_features')

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.model = model
        self.val_metrics = {'retrieval_recall@10': RetrievalRecall()}

    def forward(self, batch: Batch) -> Batch:
        """This rank's ``image_features`` and ``text_features`` ``(B, embed_dim)``, and ``logit_scale``."""
        outputs = self.model(batch['pixel_values'], batch['text_embedding'])
        return dict(zip((*self.feature_names, 'logit_scale'), outputs))

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, *args: Any) -> torch.Tensor:
        """The loss of the global batch, the same on every rank."""
        del batch, args
        image_features, text_features = (all_gather(outputs[name]) for name in self.feature_names)
        return clip_loss(image_features, text_features, outputs['logit_scale'])

    def eval_forward(self, batch: Batch, outputs: Optional[Any] = None) -> Batch:
        return outputs if outputs is not None else self(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else dict(self.val_metrics)

    def update_metric(self, batch: Batch, outputs: Batch, metric: Metric) -> None:
        metric.update(*(outputs[name] for name in self.feature_names), batch['index'], batch['text_id'])
