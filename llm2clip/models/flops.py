# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Floating-point operations of training, counted on tensors without memory.

They are those that the mathematics asks for, by which MFU is defined (PaLM, arXiv 2204.02311, appendix B): a forward
and a backward pass.  What is computed twice to save memory, such as recomputed activations, counts once, and padding
does not count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder

__all__ = ['TextFlops', 'count_flops', 'text_flops']

# Under which timm and transformers keep whether they recompute a block.
_RECOMPUTES = ('grad_checkpointing', 'gradient_checkpointing')


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, and nothing is recomputed."""
    mode = {module: module.training for module in model.modules()}
    recomputing = [(module, name) for module in model.modules() for name in _RECOMPUTES if getattr(module, name, False)]
    model.train()
    for module, name in recomputing:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in recomputing:
            setattr(module, name, True)
        for module, training in mode.items():
            module.training = training


def count_flops(model: nn.Module, *inputs: Optional[torch.Tensor]) -> int:
    """FLOPs of a forward pass and of the backward pass to every trainable parameter and input with gradient.

    Args:
        model: On any device, not sharded; it is not changed, and its weights are not read.
        *inputs: Tensors of the right sizes, such as those on the meta device.

    Returns:
        Those of matrix products and convolutions, two for a multiplication and an addition.
    """
    def without_memory(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device='cpu', requires_grad=tensor.requires_grad)

    # Fused attention computes its scores again in the backward pass; as matrix products they are counted once.
    with _as_in_training(model), unset_fake_temporarily(), FakeTensorMode(allow_non_fake_inputs=True), \
            sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        state = {name: without_memory(tensor)
                 for name, tensor in chain(model.named_parameters(), model.named_buffers())}
        outputs = functional_call(model, state, tuple(None if x is None else without_memory(x) for x in inputs))
        outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
        total = torch.stack([output.float().sum() for output in outputs if output.requires_grad]).sum()
        total.backward()
    return counter.get_total_flops()


class TextFlops(NamedTuple):
    """Of one text of n tokens: `linear` · n for the projections, and `square` · n² for attention."""

    linear: float
    square: float

    def of(self, lengths: torch.Tensor) -> float:
        """The sum over texts of these lengths, in tokens."""
        n = lengths.double()
        return float(self.linear * n.sum() + self.square * n.square().sum())


def text_flops(encoder: TextEncoder, length: int = 64) -> TextFlops:
    """Counted once at `length` and once at twice that, from which every length follows."""
    def count(n: int) -> int:
        tokens = torch.ones(1, n, dtype=torch.long, device='meta')
        # With a causal mask, transformers would look into one for padding.
        return count_flops(encoder, tokens, tokens if encoder.config.bidirectional else None, tokens)

    once, twice = count(length), count(2 * length)
    square = (twice - 2 * once) / (2 * length**2)
    return TextFlops(once / length - square * length, square)
