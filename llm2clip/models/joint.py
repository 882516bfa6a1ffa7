# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 with a text encoder that is trained, too: the LLM with LoRA, or CLIP's own."""

from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
import torch.nn as nn

from llm2clip.config import LossConfig, SelfDistillationConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.sharding import save_trainable_only

Batch = dict[str, Any]
Tokenize = Callable[[Sequence[str]], dict[str, Any]]
"""Texts -> keyword arguments of their encoder."""


class JointLLM2CLIP(ComposerLLM2CLIP):
    """Stage-2 training with a trainable text encoder.

    Batches hold ``caption`` in place of ``text_embedding``: B texts or, with K captions per image, K lists of
    B texts; an absent caption is an empty text.

    Args:
        model: Vision tower and adapter, which takes the vectors of `text_encoder`.
        text_encoder, tokenize: Encoder, tokens -> ``(B, llm_embed_dim)``, and its tokenizer: the LLM with
            LoRA, or CLIP's text tower.
        loss, self_distillation: As for `ComposerLLM2CLIP`.
    """

    def __init__(
        self, model: LLM2CLIP, text_encoder: nn.Module, tokenize: Tokenize, loss: Optional[LossConfig] = None,
        self_distillation: Optional[SelfDistillationConfig] = None,
    ) -> None:
        super().__init__(model, loss, self_distillation)
        self.text_encoder, self.tokenize = text_encoder, tokenize
        save_trainable_only(self, 'text_encoder')

    def forward(self, batch: Batch) -> Batch:
        vectors = self.embed(batch['caption'])
        return self.model(batch['pixel_values'], vectors, batch.get('sample_seed'))

    def embed(self, texts: Sequence[Union[str, Sequence[str]]]) -> torch.Tensor:
        """Embed texts as ``(B, llm_embed_dim)`` or ``(B, K, llm_embed_dim)``; an empty text becomes zero."""
        if not isinstance(texts[0], str):
            return torch.stack([self.embed(column) for column in texts], dim=1)
        device = self.model.logit_scale.device
        absent = [not str(text).strip() for text in texts]
        # A dash replaces an absent caption, so that every rank of a sharded encoder has a text to encode.
        present_texts = ['-' if missing else str(text) for text, missing in zip(texts, absent)]
        arguments = self.tokenize(present_texts)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(device, non_blocking=True)
        vectors = self.text_encoder(**arguments)
        return vectors.masked_fill(torch.tensor(absent, device=device)[:, None], 0)
