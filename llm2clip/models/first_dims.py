# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A model whose features are the first dimensions of another's, as `loss.dims` trains them (arXiv 2205.13147).

The last layer of either side gives the features before they are scaled to length 1.  So its first rows alone are the
last layer of the shorter features, and nothing is lost.
"""

import dataclasses
from typing import Optional

import torch
import torch.nn as nn

from llm2clip.config import ConfigError, ModelConfig
from llm2clip.models.llm2clip import LLM2CLIP, projection_kind
from llm2clip.remote_code.modeling_llm2clip import Adapter

__all__ = ['check_dim', 'keep_first_dims']


def check_dim(dim: Optional[int], config: ModelConfig, key: str) -> None:
    """Raise a ConfigError that names the key if a model's features have fewer dimensions than that."""
    if dim is not None and dim > config.embed_dim:
        raise ConfigError(f'{key}: {dim}, expected at most the {config.embed_dim} dimensions of the model')


def keep_first_dims(model: LLM2CLIP, config: ModelConfig, dim: Optional[int]) -> ModelConfig:
    """Let a model's features be the first `dim` of what they were, scaled to length 1 again.

    Args:
        model: Changed in place.
        config: Its configuration.
        dim: At most its `embed_dim`.  None: all, and nothing changes.

    Returns:
        Its configuration from now on.
    """
    if dim is None:
        return config
    assert dim <= config.embed_dim
    model.visual_projection = _first_outputs(model.visual_projection, config.embed_dim, dim)
    if isinstance(model.adapter, Adapter):
        model.adapter.projection = _first_outputs(model.adapter.projection, config.embed_dim, dim)
    else:
        model.adapter = _first_outputs(model.adapter, config.embed_dim, dim, bias=True)
    adapter = config.adapter
    return dataclasses.replace(
        config, embed_dim=dim, visual_projection=projection_kind(model.visual_projection),
        adapter=dataclasses.replace(adapter, name='linear' if adapter.name == 'identity' else adapter.name))


def _first_outputs(layer: nn.Module, width: int, dim: int, bias: bool = False) -> nn.Linear:
    """A layer's first `dim` outputs.

    Args:
        layer: Linear; or the identity, in whose place there is a linear layer of ones and zeros.
        width: Of its outputs.
        dim: How many of them.
        bias: Whether one that takes the identity's place has a bias.
    """
    if isinstance(layer, nn.Linear):
        weight, offset = layer.weight, layer.bias
    else:
        weight, offset = torch.eye(width), torch.zeros(width) if bias else None
    shorter = nn.Linear(weight.shape[1], dim, bias=offset is not None, device=weight.device, dtype=weight.dtype)
    shorter.load_state_dict({'weight': weight[:dim], **({} if offset is None else {'bias': offset[:dim]})})
    return shorter.train(layer.training)
