# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Models of sentence-transformers as teachers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn

from llm2clip.remote_code.sentence_transformer_llm2clip import encode_sentences
from llm2clip.teacher.caption_teacher import CaptionTeacher, Embedded
from llm2clip.teacher.fingerprint import Fingerprint

__all__ = ['SentenceTransformerTeacher']


class SentenceTransformerTeacher(CaptionTeacher):
    """A SentenceTransformer, which brings its own tokens and pooling.

    Args:
        model: From `load_sentence_transformer`, on its device.
        fingerprint: Of it and the prompt.
        prompt: Put before every caption.
        batch_tokens: Tokens per forward pass, with padding.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
    """

    def __init__(self, model: Any, fingerprint: Fingerprint, prompt: str = '', batch_tokens: int = 4096,
                 precision: str = 'fp32') -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.prompt, self.batch_tokens, self.precision = prompt, batch_tokens, precision

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def llm_embed_dim(self) -> int:
        # Modules that a model brings along need not say it.
        return self.model.get_sentence_embedding_dimension() or self.embed(['a']).vectors.shape[1]

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        """The captions as they are: `encode` tokenises them, and a tokenizer does not work for two threads at once."""
        return texts

    def embed_tokens(self, tokens: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        vectors, lengths = encode_sentences(self.model, tokens, self.prompt, self.batch_tokens, self.precision,
                                            on_batch)
        limit = self.model.max_seq_length or max(lengths, default=0)
        return Embedded(vectors, sum(min(length, limit) for length in lengths),
                        sum(length > limit for length in lengths))
