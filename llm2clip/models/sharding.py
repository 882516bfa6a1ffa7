# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which modules FSDP2 shards on their own, and which are recomputed in the backward pass."""

import dataclasses
from typing import Any

import torch
import torch.nn as nn
from composer.core import Precision
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy, sync_optimizer_and_model_params
from composer.models import ComposerModel
from composer.utils.parallelism import FSDP2Config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from llm2clip.config import ConfigError

__all__ = ['check_sharding', 'keep_float32', 'own_name', 'planned_units', 'recompute', 'recomputed_modules', 'shard',
           'sharded_modules', 'whole']


def own_name(name: str) -> str:
    """The name of a module or parameter before it was wrapped for recomputation or by DDP."""
    return '.'.join(part for part in name.removeprefix('module.').split('.') if part != '_checkpoint_wrapped_module')


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the other ranks' shards, if it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def planned_units(model: ComposerModel) -> list[nn.Module]:
    """The modules that Composer will shard on their own, outer ones before those inside them."""
    chosen: dict[nn.Module, Any] = generate_composer_model_policy(model)._run_policy(model, set(), {})
    return [module for module in model.modules() if module in chosen]


def recompute(model: ComposerModel) -> None:
    """Wrap what `fsdp.activation_checkpointing` recomputes, as Composer does it."""
    apply_ac(model, True, False, generate_composer_model_check_fn(model))


def shard(
    model: ComposerModel, optimizer: torch.optim.Optimizer, config: FSDP2Config, mesh: DeviceMesh, precision: Precision
) -> None:
    """Shard model and optimizer as Composer does it, but on any device: Composer has no mixed precision on a CPU."""
    with sync_optimizer_and_model_params(optimizer, model):
        prepare_fully_shard(model, dataclasses.replace(config, device_mesh=mesh), precision,
                            generate_composer_model_policy(model))
    keep_float32(model)


def keep_float32(model: nn.Module) -> None:
    """Undo the rounding of what has to stay float32, after Composer has sharded a model and before its first forward.

    Composer 0.32.1 gives every FSDP2 unit one `MixedPrecisionPolicy`, which in 16-bit precisions rounds the unit's
    weights and its inputs: a temperature of 100 to 98.9.  Here, a unit of scalars alone, such as temperature and bias,
    keeps them, and a unit for which its model's ``fsdp_float32_inputs_fn`` returns True takes its inputs as they are;
    autocast still rounds for matrix products.  torch 2.7 reads the policies when the model first runs.
    """
    for child in model.children():
        takes_float32 = getattr(child, 'fsdp_float32_inputs_fn', lambda module: False)
        for module in child.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                group: Any = state._fsdp_param_group
                if group is not None and all(param._orig_size.numel() == 1 for param in group.fsdp_params):
                    state._mp_policy = group.mp_policy = MixedPrecisionPolicy()
                elif takes_float32(module):
                    state._mp_policy = dataclasses.replace(state._mp_policy, cast_forward_inputs=False)


def sharded_modules(model: nn.Module) -> list[str]:
    """Names of the modules that are FSDP2 units."""
    return [own_name(name) for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def recomputed_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose activations are recomputed."""
    return [own_name(name) for name, module in model.named_modules() if isinstance(module, CheckpointWrapper)]


def check_sharding(model: nn.Module, activation_checkpointing: bool) -> str:
    """One line on what FSDP2 shards and recomputes, once Composer has prepared the model.

    Raises:
        ConfigError: Recomputation was asked for, and the model has no module for it.
    """
    units, recomputed = sharded_modules(model), recomputed_modules(model)
    if activation_checkpointing and not recomputed:
        raise ConfigError('fsdp.activation_checkpointing: this model has no repeated blocks that could be recomputed; '
                          'leave it out')
    again = f', {len(recomputed)} of which are recomputed in the backward pass' if recomputed else ''
    return f'FSDP2 shards {len(units)} modules one by one, from {units[0]} to {units[-1]}{again}'
