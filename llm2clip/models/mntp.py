# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Masked next-token prediction, the optional warm start of stage 1 (LLM2Vec, BehnamGhader et al. 2024, section 2.2)."""

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.models import ComposerModel

from llm2clip.models.flops import count_flops, text_flops
from llm2clip.models.trainable import save_trainable_only
from llm2clip.remote_code.text_encoder_llm2clip import TEXT_ARGUMENTS, TextEncoder

__all__ = ['MaskedNextTokenPrediction', 'mntp_loss']

IGNORED = -100


def mntp_loss(
    states: torch.Tensor, labels: torch.Tensor, head: nn.Module, softcap: Optional[float] = None
) -> torch.Tensor:
    """Cross-entropy of the masked tokens, each predicted from the state of the position before it.

    Args:
        states: ``(B, T, D)`` of the last layer.
        labels: ``(B, T)``, the token that was masked at a position, -100 elsewhere; never at a text's position 0.
        head: ``(…, D)`` -> ``(…, vocabulary)``.
        softcap: Gemma 2's bound on logits.

    Returns:
        The mean over the masked tokens, a scalar in float32.
    """
    masked = labels[:, 1:] != IGNORED
    logits = head(states[:, :-1][masked]).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels[:, 1:][masked])


class MaskedNextTokenPrediction(ComposerModel):
    """Teaches an LLM without causal mask to use the tokens on its right.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels`` ``(B, T)``, or the same packed in a row.  Composer
    weighs microbatches and ranks by their masked tokens, so the loss is the mean over those of the global batch.

    Args:
        text_encoder: The encoder to train.
        head: The LLM's own language-model head, frozen.
    """

    def __init__(self, text_encoder: TextEncoder, head: nn.Linear) -> None:
        super().__init__()
        save_trainable_only(self)
        self.text_encoder = text_encoder
        self.head = head
        self.softcap = getattr(text_encoder.llm.config, 'final_logit_softcapping', None)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """States ``(B, T, llm_embed_dim)``."""
        return self.text_encoder(**{key: batch[key] for key in TEXT_ARGUMENTS if key in batch})

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        """The mean over this microbatch's masked tokens."""
        del args
        return mntp_loss(outputs, batch['labels'], self.head, self.softcap)

    def batch_flops(self) -> Callable[[dict[str, torch.Tensor]], float]:
        """Counts FLOPs once; what is returned says, of a batch, those of the LLM and of its head on masked tokens."""
        text = text_flops(self.text_encoder)
        state = torch.empty(1, self.head.in_features, device='meta', requires_grad=True)
        token = count_flops(self.head, state)
        return lambda batch: (text.of(batch['attention_mask'].sum(1))
                              + token * int((batch['labels'][:, 1:] != IGNORED).sum()))
