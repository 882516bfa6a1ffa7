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

    Batches hold ``caption`` in place of ``text_embedding``: B texts, or, where an image has K captions, K lists of B
    texts, of which those of absent captions are empty.

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
        """``(B, llm_embed_dim)``, not normalised; zero for an empty text."""
        device = self.model.logit_scale.device
        absent = torch.tensor([not text.strip() for text in texts], device=device)
        # A dash in place of an absent caption: every rank of a sharded encoder has something to read.
        tokens = self.tokenizer(['-' if gap else text for gap, text in zip(absent, texts)])
        vectors = self.text_encoder(**{name: value.to(device) for name, value in tokens.items()})
        return vectors.masked_fill(absent[:, None], 0)

    def batch_flops(self) -> None:
        """Not known: how long the texts are is the tokenizer's to say."""

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        captions = batch['caption']
        vectors = (self.embed(captions) if isinstance(captions[0], str)
                   else torch.stack([self.embed(column) for column in captions], 1))
        return self.model(batch['pixel_values'], vectors, batch.get('sample_seed'))
