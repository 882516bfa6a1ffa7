# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Losses as users write them, for `loss.name: user_losses:CLASS`."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer import Algorithm, Event, Logger, State

SETTINGS: dict[str, Any] = {}


class Bilinear(nn.Module):
    """Cross-entropy from each text to its image under a similarity that is learned; without the temperature."""

    def __init__(self, dim: int, scale: float = 5.0) -> None:
        super().__init__()
        self.matrix = nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(
        self, image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor
    ) -> torch.Tensor:
        assert image_features.ndim == 2 and text_features.ndim == 3 and logit_scale.shape == (1,)
        texts = text_features.flatten(0, 1)
        logits = self.scale * texts @ self.matrix(image_features).T
        owner = torch.arange(len(texts), device=texts.device) // text_features.shape[1]
        return F.cross_entropy(logits, owner)


class Halved(Algorithm):
    """The loss of a microbatch, halved."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        state.loss = state.loss / 2
