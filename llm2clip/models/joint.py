# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 with a text encoder that is trained, too: the LLM with LoRA, or CLIP's own."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn as nn

from llm2clip.config import LossConfig, SelfDistillationConfig
from llm2clip.modeling.text_encoder import to_device
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.sharding import save_trainable_only

Batch = dict[str, Any]
Tokenize = Callable[[Sequence[str]], dict[str, Any]]
"""Texts -> keyword arguments of their encoder."""
Captions = Sequence[Any]
"""B texts, or K sequences of B texts."""


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

    def features(self, batch: Batch) -> Batch:
        vectors = embed_captions(batch['caption'], self.encode)
        return self.model(batch['pixel_values'], vectors, batch.get('sample_seed'))

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed B texts as ``(B, llm_embed_dim)``."""
        return self.text_encoder(**to_device(self.tokenize(texts), self.model.logit_scale.device))


def embed_captions(captions: Captions, encode: Callable[[Sequence[str]], torch.Tensor]) -> torch.Tensor:
    """Embed the captions of B images as ``(B, D)`` or, of K lists with B captions each, as ``(B, K, D)``.

    The vector of an absent caption, an empty text, is zero.  `encode`, B texts -> ``(B, D)``, gets a dash
    for it, so that every rank of a sharded encoder has a text to encode.
    """
    if not isinstance(captions[0], str):
        return torch.stack([embed_captions(column, encode) for column in captions], dim=1)
    absent = [not text.strip() for text in captions]
    vectors = encode(['-' if missing else text for text, missing in zip(captions, absent)])
    return vectors.masked_fill(torch.tensor(absent)[:, None].to(vectors.device, non_blocking=True), 0)
