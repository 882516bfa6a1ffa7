# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Parameter groups: which weights decay, and which part learns how fast."""

from collections.abc import Mapping
from typing import Any, Optional

import torch

from llm2clip.config import ConfigError

__all__ = ['parameter_groups']


def parameter_groups(
    model: torch.nn.Module, lr: float, weight_decay: float = 0.0, lr_scale: Optional[Mapping[str, float]] = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer over the trainable parameters.

    One-dimensional parameters (biases, norms, `logit_scale`) do not decay.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Of the other parameters.
        lr_scale: Name of a submodule -> factor on its learning rate.

    Raises:
        ConfigError: `lr_scale` names no submodule that has trainable parameters.
    """
    lr_scale = lr_scale or {}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    unused = set(lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((part for part in lr_scale if part in name.split('.')), None)
        unused.discard(part or '')
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr * lr_scale.get(part or '', 1.0), decay), []).append(parameter)
    if unused:
        raise ConfigError(f'lr_scale: no trainable part of the model is called {", ".join(sorted(unused))}')
    return [{'params': params, 'lr': rate, 'weight_decay': decay} for (rate, decay), params in groups.items()]
