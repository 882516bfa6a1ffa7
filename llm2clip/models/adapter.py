# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The text side's adapter: a small residual MLP on the frozen teacher's vector."""

import torch.nn as nn

from llm2clip.config import AdapterConfig, ConfigError
from llm2clip.remote_code.modeling_llm2clip import Adapter, ResidualMLP

__all__ = ['Adapter', 'ResidualMLP', 'build_adapter']


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
