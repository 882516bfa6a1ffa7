# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The optimizer: weight decay and learning rate per parameter, and the fused kernel."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from llm2clip.config import TrainConfig
from llm2clip.errors import ConfigError
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.registry import build, check, named


def build_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build the configured optimizer over the `parameter_groups` of the model.

    On a GPU, it uses the ``fused`` kernel if available, unless the configuration sets `fused` or `foreach`.
    With FSDP2, a loop over hundreds of sharded parameters would keep the host busy for longer than the GPU.
    """
    name, arguments = named(config.optimizer, 'optimizer')
    lr = arguments.pop('lr')
    weight_decay = arguments.pop('weight_decay', 0.0)
    groups = parameter_groups(model, lr, weight_decay, config.lr_scale, config.layer_decay)
    if 'betas' in arguments:
        arguments['betas'] = tuple(arguments['betas'])
    can_fuse = 'fused' in inspect.signature(check('optimizer', name, arguments)).parameters
    on_gpu = config.device == 'gpu' or config.device is None and torch.cuda.is_available()
    # With sharded weights (DTensor), torch 2.7 supports the fused kernel of AdamW alone.
    if can_fuse and on_gpu and (config.fsdp is None or name == 'adamw'):
        arguments.setdefault('fused', not arguments.get('foreach'))
    optimizer = build('optimizer', name, {'params': groups, 'lr': lr} | arguments)
    if can_fuse:
        optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Let `fused` follow the configuration of this run, not that of the run that wrote the checkpoint."""
    groups = [group | {'fused': optimizer.defaults['fused']} for group in state['param_groups']]
    return state | {'param_groups': groups}


def parameter_groups(
    model: torch.nn.Module, lr: float, weight_decay: float = 0.0,
    lr_scale: Mapping[str, float] = {}, layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay, in ascending order of the rates.

    One-dimensional parameters (biases, norms, `logit_scale`) do not decay, nor does the vision tower's
    `no_weight_decay`.  The learning rate is multiplied by `layer_decay` per layer from the tower's last layer
    down, and by `lr_scale` of a submodule or parameter.  A name in `lr_scale` without trainable parameters is
    a ConfigError.
    """
    layer_scale: dict[torch.nn.Parameter, float] = {}
    no_decay: set[torch.nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            for name, parameter in module.trunk.named_parameters():
                layer_scale[parameter] = layer_decay ** (module.num_layers - 1 - module.layer_ids[name])
                if name in module.no_weight_decay:
                    no_decay.add(parameter)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    unused = set(lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_scale.get(parameter, 1.0)
        part = next((part for part in lr_scale if part in name.split('.')), None)
        if part is not None:
            unused.discard(part)
            scale = lr_scale[part] * scale
        decay = weight_decay
        if parameter.ndim < 2 or parameter in no_decay:
            decay = 0.0
        groups.setdefault((lr * scale, decay), []).append(parameter)
    if unused:
        names = ', '.join(sorted(unused))
        raise ConfigError(f'no trainable part of the model is called {names}', key='lr_scale')
    by_rate = sorted(groups.items(), key=lambda item: item[0])
    return [{'params': group, 'lr': rate, 'weight_decay': decay} for (rate, decay), group in by_rate]
