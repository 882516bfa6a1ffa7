# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The text side's adapter: a small residual MLP on the frozen teacher's vector."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from llm2clip.config import AdapterConfig, ConfigError

__all__ = ['Adapter', 'ResidualMLP', 'build_adapter']


class ResidualMLP(nn.Module):
    """``x + down(gelu(up(norm(x))))``, a block of the adapter.

    Args:
        width: Of its input and output.
        expansion: Hidden width over `width`.
    """

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Adapter(nn.Module):
    """L2-normalise, `depth` residual MLPs, LayerNorm, linear projection (the official code's text adaptor).

    Args:
        llm_embed_dim: Width of the teacher's vector.
        embed_dim: Width of the joint space.
        depth: Residual blocks.
        expansion: Hidden width of a block over its width.
        normalize: Whether the vector is scaled to length 1 first.
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


def build_adapter(config: AdapterConfig, llm_embed_dim: int, embed_dim: int) -> nn.Module:
    """The adapter by its name.

    Raises:
        ConfigError: There is no such adapter, or the identity would have to change the width.
    """
    if config.name == 'residual':
        return Adapter(llm_embed_dim, embed_dim, config.depth, config.expansion, config.normalize)
    if config.name == 'linear':
        return nn.Linear(llm_embed_dim, embed_dim)
    if config.name != 'identity':
        raise ConfigError(f'model.adapter.name: {config.name!r} is not one of residual, linear, identity')
    if llm_embed_dim != embed_dim:
        raise ConfigError(f"model.embed_dim: {embed_dim} is not the width of the teacher's vectors, {llm_embed_dim}, "
                          'as the identity adapter needs')
    return nn.Identity()
