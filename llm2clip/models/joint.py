# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What LLM2CLIP replaces, for comparisons: a text encoder that is trained together with the vision tower."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn as nn

from llm2clip.config import LossConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP

__all__ = ['JointLLM2CLIP']


class JointLLM2CLIP(ComposerLLM2CLIP):
    """Stage 2 with a text encoder in the loop that learns: CLIP itself, or LoRA on the LLM.

    Batches hold ``caption`` in place of ``text_embedding``: B texts, in evaluation K lists of B texts.

    Args:
        model: Vision tower and adapter.
        text_encoder: Tokens -> ``(B, llm_embed_dim)``.
        tokenizer: Texts -> the encoder's keyword arguments.
        loss: Which loss.
    """

    def __init__(
        self, model: LLM2CLIP, text_encoder: nn.Module, tokenizer: Callable[[Sequence[str]], dict[str, torch.Tensor]],
        loss: Optional[LossConfig] = None,
    ) -> None:
        super().__init__(model, loss)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """``(B, llm_embed_dim)``, not normalised."""
        tokens = self.tokenizer(texts)
        return self.text_encoder(**{name: value.to(self.model.logit_scale.device) for name, value in tokens.items()})

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        captions = batch['caption']
        vectors = (self.embed(captions) if isinstance(captions[0], str)
                   else torch.stack([self.embed(column) for column in captions], 1))
        return self.model(batch['pixel_values'], vectors, batch.get('sample_seed'))
