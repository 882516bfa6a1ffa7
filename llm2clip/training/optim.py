# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Parameter groups: which weights decay, and which part learns how fast."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from llm2clip.config import ConfigError
from llm2clip.models.vision_encoder import VisionEncoder

__all__ = ['describe_groups', 'parameter_groups']


def parameter_groups(
    model: torch.nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    lr_scale: Optional[Mapping[str, float]] = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer over the trainable parameters, in the order of their learning rates.

    One-dimensional parameters (biases, norms, `logit_scale`) do not decay, nor do those that the vision tower excepts.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Of the other parameters.
        lr_scale: Name of a submodule or parameter -> factor on its learning rate.
        layer_decay: Factor on the learning rate from each layer of the vision tower to the one below it.

    Raises:
        ConfigError: `lr_scale` names nothing that is trained.
    """
    lr_scale = lr_scale or {}
    layer_scale, no_decay = _vision_layers(model, layer_decay)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    unused = set(lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((part for part in lr_scale if part in name.split('.')), None)
        unused.discard(part or '')
        scale = lr_scale.get(part or '', 1.0) * layer_scale.get(id(parameter), 1.0)
        decay = weight_decay if parameter.ndim > 1 and id(parameter) not in no_decay else 0.0
        groups.setdefault((lr * scale, decay), []).append(parameter)
    if unused:
        raise ConfigError(f'lr_scale: no trainable part of the model is called {", ".join(sorted(unused))}')
    return [{'params': group, 'lr': rate, 'weight_decay': decay}
            for (rate, decay), group in sorted(groups.items(), key=lambda item: item[0])]


def _vision_layers(model: torch.nn.Module, layer_decay: float) -> tuple[dict[int, float], set[int]]:
    """The factor on the learning rate of each vision parameter, by its id, and the ids of those without decay."""
    scale: dict[int, float] = {}
    no_decay: set[int] = set()
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            for name, parameter in module.trunk.named_parameters():
                scale[id(parameter)] = layer_decay ** (module.num_layers - 1 - module.layer_ids[name])
                if name in module.no_weight_decay:
                    no_decay.add(id(parameter))
    return scale, no_decay


def describe_groups(model: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> str:
    """A table of the groups: learning rate, weight decay, parameters, and where they are."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lines = ['optimizer groups:', f'{"":>3}{"lr":>12}{"decay":>8}{"parameters":>14}  of']
    for i, group in enumerate(groups):
        parts = sorted({_part(names[id(parameter)]) for parameter in group['params']})
        where = ', '.join(parts[:4]) + (f' and {len(parts) - 4} more' if len(parts) > 4 else '')
        count = sum(parameter.numel() for parameter in group['params'])
        lines.append(f'{i:>3}{group["lr"]:>12.3g}{group["weight_decay"]:>8.3g}{count:>14,}  {where}')
    return '\n'.join(lines)


def _part(name: str) -> str:
    """`model.vision_encoder.trunk.blocks.3.attn.qkv.weight` -> `vision_encoder.trunk.blocks.3`."""
    words = name.removeprefix('model.').split('.')
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    return '.'.join(words[:numbers[0] + 1] if numbers else words[:-1] or words)
