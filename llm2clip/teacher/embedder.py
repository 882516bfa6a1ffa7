# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Interface of what embeds: frozen text encoders and frozen vision towers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from llm2clip.teacher.fingerprint import Fingerprint

OnBatch = Callable[[int], object]
"""Called after each forward pass with its number of items."""


class Embedded(NamedTuple):
    """Vectors and token counts of N items."""

    vectors: torch.Tensor
    """``(N, D)`` in float32 on the embedder's device."""
    tokens: int
    """Number of tokens that were processed, without padding; an image counts as one."""
    truncated: int
    """Number of captions that were truncated to the maximum length."""
    left_out: int = 0
    """Number of captions that were too long and not embedded; their vectors are zero."""


class Embedder(ABC):
    """Frozen network that embeds items, captions or images; an item always gets the same vector.

    Args:
        module: Network that computes the vectors, in evaluation mode, on its device; callers may move it.
        width: Number D of a vector's dimensions.
        fingerprint: Fingerprint of the weights and of all settings that decide a vector.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
    """

    def __init__(self, module: Any, width: int, fingerprint: Fingerprint, precision: str) -> None:
        self.module = module
        self.width = width
        self.fingerprint = fingerprint
        self.precision = precision

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @abstractmethod
    def prepare(self, items: Sequence[Any]) -> Any:
        """Tokenise non-empty captions, or decode images; a thread may call this during `embed_prepared`."""

    @abstractmethod
    def embed_prepared(self, inputs: Any, on_batch: OnBatch) -> Embedded:
        """Embed what `prepare` returned."""

    def embed(self, items: Sequence[Any]) -> Embedded:
        """Prepare and embed items."""
        return self.embed_prepared(self.prepare(items), on_batch=lambda num_items: None)
