# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The optimizer: which weights decay, which part learns how fast, and which kernel updates them."""

import inspect
from collections.abc import Mapping
from typing import Any, Optional

import torch

from llm2clip.config import ConfigError, Stage2Config, TrainConfig
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.registry import build, check, named

__all__ = ['FUSED_SHARDS', 'build_optimizer', 'device_kind']

# Optimizers whose fused kernel torch 2.7 also runs on sharded weights (DTensor).
FUSED_SHARDS = ('adamw',)


def device_kind(device: Optional[str]) -> str:
    """``gpu`` or ``cpu``, without using it; where none is named, a GPU if there is one."""
    return device or ('gpu' if torch.cuda.is_available() else 'cpu')


def build_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups` of the model.

    On a GPU it updates all parameters by one kernel where it can (``fused``), unless the configuration says otherwise:
    with FSDP2, a loop over hundreds of sharded parameters would keep the host busy for longer than the GPU.
    """
    name, arguments = named(config.optimizer, 'optimizer')
    lr, weight_decay = arguments.pop('lr'), arguments.pop('weight_decay', 0.0)
    scales: dict[str, Any] = {}
    if isinstance(config, Stage2Config):
        scales = {'lr_scale': config.lr_scale, 'layer_decay': config.layer_decay}
    groups = parameter_groups(model, lr, weight_decay, **scales)
    if 'betas' in arguments:
        arguments['betas'] = tuple(arguments['betas'])
    can_fuse = 'fused' in inspect.signature(check('optimizer', name, arguments)).parameters
    if can_fuse and device_kind(config.device) == 'gpu' and (config.fsdp is None or name in FUSED_SHARDS):
        arguments = {'fused': not arguments.get('foreach'), **arguments}
    optimizer = build('optimizer', name, {'params': groups, 'lr': lr, **arguments})
    if can_fuse:
        # A checkpoint's state computes as this run is configured, not as the one that wrote it.
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: {**state, 'param_groups': [
            {**group, 'fused': optimizer.defaults['fused']} for group in state['param_groups']]})
    return optimizer


def parameter_groups(
    model: torch.nn.Module, lr: float, weight_decay: float = 0.0, lr_scale: Optional[Mapping[str, float]] = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer over the trainable parameters, in the order of their learning rates.

    One-dimensional parameters (biases, norms, `logit_scale`) do not decay, nor do those that the vision tower excepts.
    The learning rate falls by `layer_decay` from each layer of the tower to the one below it, and has a factor where
    `lr_scale` names a submodule or parameter; one that is not trained is a ConfigError.
    """
    lr_scale = lr_scale or {}
    layer_scale: dict[int, float] = {}
    no_decay: set[int] = set()
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            for name, parameter in module.trunk.named_parameters():
                layer_scale[id(parameter)] = layer_decay ** (module.num_layers - 1 - module.layer_ids[name])
                if name in module.no_weight_decay:
                    no_decay.add(id(parameter))
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
