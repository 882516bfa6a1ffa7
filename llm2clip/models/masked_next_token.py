# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Masked next-token prediction, the optional warm start of stage 1 (LLM2Vec, arXiv 2404.05961, section
2.2)."""

from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.models import ComposerModel

from llm2clip.modeling.text_encoder import TextEncoder
from llm2clip.models.sharding import save_trainable_only

_IGNORED = -100


def mntp_loss(
    states: torch.Tensor, labels: torch.Tensor, head: nn.Module, softcap: Optional[float] = None
) -> torch.Tensor:
    """Cross-entropy of the masked tokens, each predicted from the hidden state at the preceding position.

    Args:
        states: ``(B, T, D)``, hidden states of the last layer.
        labels: ``(B, T)``, the original token at masked positions, -100 elsewhere;
            position 0 is never masked.
        head: ``(…, D)`` -> ``(…, vocabulary)``.
        softcap: Gemma 2's bound on logits.  None: no bound.

    Returns:
        The mean over the masked tokens, a scalar in float32.
    """
    masked = labels[:, 1:] != _IGNORED
    logits = head(states[:, :-1][masked]).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels[:, 1:][masked])


class MaskedNextTokenPrediction(ComposerModel):
    """Masked next-token prediction, which teaches an LLM without a causal mask to use context to the right.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels`` ``(B, T)``, or the same packed into one
    row.  Composer weights microbatches and ranks by their masked tokens, so the loss is the mean over the
    global batch.  The `head` is the LLM's own language-model head, frozen.
    """

    def __init__(self, text_encoder: TextEncoder, head: nn.Linear) -> None:
        super().__init__()
        save_trainable_only(self)
        self.text_encoder = text_encoder
        self.head = head
        self.softcap = getattr(text_encoder.llm.config, 'final_logit_softcapping', None)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return hidden states ``(B, T, llm_embed_dim)``."""
        return self.text_encoder(**TextEncoder.arguments(batch))

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor], *_: Any) -> torch.Tensor:
        """Return the mean over this microbatch's masked tokens."""
        return mntp_loss(outputs, batch['labels'], self.head, self.softcap)
