# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What is done with a model's modules one by one: FSDP2 shards them over ranks, activations are recomputed, and
repeated blocks are compiled."""

import dataclasses
from typing import Any, Optional

import torch
import torch._dynamo
import torch.nn as nn
from composer.core import Precision
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy, sync_optimizer_and_model_params
from composer.models import ComposerModel
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from llm2clip.config import ConfigError, FsdpConfig

__all__ = ['check_fsdp', 'check_sharding', 'compile_blocks', 'fsdp2_config', 'keep_float32', 'own_name', 'prefetch',
           'recompute', 'recomputed_modules', 'shard', 'sharded_modules', 'whole']

# Blocks of one class share this limit: those of a convolutional network differ in their shapes, and each is compiled
# once more for evaluation, for a pass without gradients, and for lengths of texts that vary.  torch's own limit of 8
# would leave the rest uncompiled.
_RECOMPILE_LIMIT = 256


def check_fsdp(config: FsdpConfig, device: str) -> None:
    """Raise a ConfigError if a number of ranks does not go with those there are.

    Args:
        config: The run's.
        device: ``gpu`` or ``cpu``.
    """
    ranks, groups = dist.get_world_size(), config.reshard_after_forward
    if ranks % config.replicate:
        raise ConfigError(f'fsdp.replicate: {config.replicate} copies of the model, expected a number that divides '
                          f'that of the ranks, {ranks}')
    shards = ranks // config.replicate
    if not isinstance(groups, bool) and (groups < 1 or shards % groups):
        raise ConfigError(f'fsdp.reshard_after_forward: {groups} ranks, expected true, false or a number that divides '
                          f'that of the ranks of a copy of the model, {shards}')
    if config.activation_cpu_offload and device == 'cpu':
        raise ConfigError("fsdp.activation_cpu_offload: activations on a CPU are in the host's memory already")


def fsdp2_config(config: FsdpConfig, device: str) -> FSDP2Config:
    """Composer's configuration, with the mesh of ranks for copies of the model; collective if there are several.

    Args:
        config: The run's.
        device: ``gpu`` or ``cpu``.
    """
    mesh = None
    if config.replicate > 1:
        shape = (config.replicate, dist.get_world_size() // config.replicate)
        # The last dimension is that of neighbours, which a node's fast links join.
        mesh = init_device_mesh('cuda' if device == 'gpu' else device, shape, mesh_dim_names=('replicate', 'shard'))
    return FSDP2Config(
        device_mesh=mesh,
        reshard_after_forward=config.reshard_after_forward,
        activation_checkpointing=bool(config.activation_checkpointing),
        activation_cpu_offload=config.activation_cpu_offload,
        state_dict_type=config.state_dict_type,
        mixed_precision=config.mixed_precision,
    )


def prefetch(model: nn.Module, ahead: Optional[int]) -> None:
    """Let each FSDP2 unit gather the weights of the next ones, and in the backward pass of those before it.

    Args:
        model: A ComposerModel, sharded.
        ahead: How many units; None leaves all as torch does it.
    """
    if ahead is None:
        return
    for child in model.children():  # each of which Composer makes a tree of units by itself
        units: list[FSDPModule] = [module for module in child.modules() if isinstance(module, FSDPModule)]
        for i, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[i + 1:i + 1 + ahead])
            unit.set_modules_to_backward_prefetch(units[max(0, i - ahead):i][::-1])


def own_name(name: str) -> str:
    """The name of a module or parameter before it was wrapped for recomputation or by DDP."""
    return '.'.join(part for part in name.removeprefix('module.').split('.') if part != '_checkpoint_wrapped_module')


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the other ranks' shards, if it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def recompute(model: ComposerModel) -> None:
    """Wrap what `fsdp.activation_checkpointing` recomputes, as Composer does it."""
    apply_ac(model, True, False, generate_composer_model_check_fn(model))


def shard(
    model: ComposerModel, optimizer: torch.optim.Optimizer, config: FSDP2Config, precision: Precision
) -> None:
    """Shard model and optimizer as Composer does it, but on any device: Composer has no mixed precision on a CPU."""
    with sync_optimizer_and_model_params(optimizer, model):
        prepare_fully_shard(model, config, precision, generate_composer_model_policy(model))
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


def compile_blocks(model: ComposerModel, **arguments: Any) -> None:
    """Compile every repeated block of a model, in place, when it first runs.

    Not the whole model is compiled, as Composer's Trainer would do it.  Blocks of one kind share what was compiled for
    the first of them, and what stands between them runs as before: FSDP2's gathering of weights, the recomputation of
    activations, patch dropout, GradCache's two passes, the loss.  The modules stay the same, and so do the names in
    checkpoints.

    Args:
        model: Before it is sharded or wrapped.
        **arguments: Of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for child in model.children():
        # What a part calls its blocks, or else shards on its own.
        is_block: Any = getattr(child, 'is_block', getattr(child, 'fsdp_wrap_fn', None))
        for module in child.modules():
            if is_block is not None and is_block(module):
                module.compile(**arguments)
