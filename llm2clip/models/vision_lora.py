# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LoRA on the vision tower, by peft: added for training, and merged when a run is read."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn as nn
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from timm.layers.conv2d_same import Conv2dSame
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from llm2clip.config import LoraConfig
from llm2clip.errors import ConfigError
from llm2clip.modeling.loaders import check_keys
from llm2clip.teacher.lora import compute_in_input_dtype


def dry_forward(trunk: nn.Module, image_size: int, hooks: Sequence[RemovableHandle]) -> None:
    """Run a tower in evaluation mode on the meta device, without memory or values, and remove its `hooks`."""
    weights = {name: torch.empty_like(tensor, device='meta')
               for name, tensor in chain(trunk.named_parameters(), trunk.named_buffers())}
    image = torch.empty(1, 3, image_size, image_size, dtype=next(trunk.parameters()).dtype, device='meta')
    with torch.no_grad():
        functional_call(trunk, weights, (image,))
    for hook in hooks:
        hook.remove()


def add_lora(trunk: nn.Module, config: LoraConfig, image_size: int) -> None:
    """Freeze a tower in evaluation mode, and add trainable LoRA weights to its projections in place.

    Projections are linear layers and 1×1 convolutions that a forward pass calls.  LoRA would not affect
    others, such as the output projection of torch's MultiheadAttention,
    whose weights are read without a call.

    Raises:
        ConfigError: The tower has no projection with a configured name.
    """
    module: Any
    for module in trunk.modules():
        if hasattr(module, 'qkv_bias_separate'):
            # timm's EVA, BEiT and Swin v2 otherwise read the weights of `qkv`, too
            module.qkv_bias_separate = True
    called: list[str] = []
    hooks = [module.register_forward_hook(lambda *_, name=name: called.append(name))
             for name, module in trunk.named_modules() if _is_projection(module)]
    dry_forward(trunk, image_size, hooks)
    arguments = dataclasses.asdict(config)
    last = {name: name.rsplit('.', 1)[-1] for name in called}
    parts = set(last.values())
    names = arguments.pop('target_modules') or parts
    unknown = sorted(set(names) - parts)
    if unknown:
        raise ConfigError(f'the tower has no projection called {", ".join(unknown)}; it has '
                          f'{", ".join(sorted(parts))}', key='lora.target_modules')
    targets = '|'.join(re.escape(name) for name, part in last.items() if part in names)
    with next(trunk.parameters()).device:
        inject_adapter_in_model(PeftLoraConfig(bias='none', target_modules=targets, **arguments), trunk)
    compute_in_input_dtype(trunk)


def _is_projection(module: Any) -> bool:
    if type(module) in (nn.Conv2d, Conv2dSame):
        return module.kernel_size == (1, 1) and module.groups == 1
    # a subclass may change its weights in the forward pass, and could not be merged
    return type(module) is nn.Linear


def merge_lora(trunk: nn.Module) -> None:
    """Add the LoRA weights of a tower to its own weights in place, in their dtype."""
    for name, module in [*trunk.named_modules()]:
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)  # pyright: ignore[reportCallIssue]
            trunk.set_submodule(name, module.get_base_layer())


def load_without_lora(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load weights that were saved without LoRA into a model that may have it, and keeps its LoRA weights.
    A LoadError that names `where` if weights are missing, unexpected or of another shape."""
    ours = model.state_dict()
    names = {name.replace('.base_layer.', '.'): name for name in ours if '.lora_' not in name}
    check_keys(state, {plain: ours[name] for plain, name in names.items()}, where)
    model.load_state_dict({name: state[plain] for plain, name in names.items()}, strict=False)
