# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text adapters, and the alignment head that projects texts or images: vectors -> the shared space.

Exported models contain a copy of this file.  It imports only torch.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualMLP(nn.Module):
    """Adapter block ``x + down(gelu(up(norm(x))))`` with a hidden width of `expansion` times `width`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Adapter(nn.Module):
    """Text adapter: L2 normalisation (if `normalize`), `depth` blocks, LayerNorm, linear projection.

    The blocks are residual MLPs as in the official code's text adaptor, `expansion` times as wide inside.
    """

    def __init__(
        self, llm_embed_dim: int, embed_dim: int, depth: int = 4, expansion: int = 2, normalize: bool = True
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.Sequential(*(ResidualMLP(llm_embed_dim, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(llm_embed_dim)
        self.projection = nn.Linear(llm_embed_dim, embed_dim)

    def forward(self, text_embedding: torch.Tensor) -> torch.Tensor:
        """``(…, llm_embed_dim)`` -> ``(…, embed_dim)``, not normalised."""
        if self.normalize:
            text_embedding = F.normalize(text_embedding, dim=-1)
        return self.projection(self.norm(self.blocks(text_embedding)))

    @staticmethod
    def is_block(module: nn.Module) -> bool:
        """Whether a module is one of the blocks."""
        return isinstance(module, ResidualMLP)


class AlignmentHead(nn.Module):
    """Alignment layer of SAIL (arXiv 2412.04616, section 3): LayerNorm and an MLP with one hidden layer.

    The hidden layer has `expansion` times `width` units.  If `gated`, a ReLU6 of one linear layer gates
    another (GLU); otherwise it is GELU.
    """

    def __init__(self, width: int, embed_dim: int, expansion: int, gated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.gate = nn.Linear(width, expansion * width) if gated else None
        self.projection = nn.Linear(expansion * width, embed_dim)
        for layer in (self.up, self.gate, self.projection):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, width)`` -> ``(…, embed_dim)``, not normalised."""
        x = self.norm(x)
        if self.gate is None:
            return self.projection(F.gelu(self.up(x)))
        return self.projection(F.relu6(self.gate(x)) * self.up(x))


class Heads(nn.ModuleList):
    """Heads that are independent of each other: their features, each scaled to length 1, are concatenated.
    The cosine similarity of two sides with as many heads is the mean of those of each pair."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, width)`` -> ``(…, len(self) * embed_dim)``."""
        return torch.cat([F.normalize(head(x).float(), dim=-1) for head in self], dim=-1)


def make_heads(number: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Return what `make` returns, or that many of them as `Heads`."""
    return make() if number == 1 else Heads(make() for _ in range(number))


def make_adapter(
    llm_embed_dim: int, embed_dim: int, name: str, depth: int, expansion: int, normalize: bool
) -> nn.Module:
    """Build the adapter ``residual``, ``mlp``, ``glu``, ``linear`` or ``identity`` with new weights."""
    if name == 'residual':
        return Adapter(llm_embed_dim, embed_dim, depth, expansion, normalize)
    if name in ('mlp', 'glu'):
        return AlignmentHead(llm_embed_dim, embed_dim, expansion, gated=name == 'glu')
    return {'linear': nn.Linear, 'identity': nn.Identity}[name](llm_embed_dim, embed_dim)


def make_projection(width: int, embed_dim: int, name: str, expansion: int) -> nn.Module:
    """Build the projection of images ``linear``, ``affine``, ``mlp``, ``glu`` or ``identity`` with new
    weights."""
    if name == 'identity':
        return nn.Identity()
    if name in ('mlp', 'glu'):
        return AlignmentHead(width, embed_dim, expansion, gated=name == 'glu')
    return nn.Linear(width, embed_dim, bias=name == 'affine')
