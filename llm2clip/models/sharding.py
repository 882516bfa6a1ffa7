# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What is done with a model's modules: FSDP2 shards them, blocks are compiled, checkpoints leave frozen ones out."""

import dataclasses
from typing import Any, Optional

import torch
import torch._dynamo
import torch.nn as nn
from composer.models import ComposerModel
from composer.utils.parallelism import FSDP2Config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from llm2clip.config import ConfigError, FsdpConfig

__all__ = ['compile_blocks', 'fsdp2_config', 'save_trainable_only', 'set_up_units', 'unwrapped_name', 'whole']

# Blocks of one class share this limit: those of a convolutional network differ in their shapes, and each is compiled
# once more for evaluation, for a pass without gradients, and for lengths of texts that vary.  torch's own limit of 8
# would leave the rest uncompiled.
_RECOMPILE_LIMIT = 256


@dataclasses.dataclass
class _Sharding(FSDP2Config):
    """With copies of the model: Composer 0.32.1 replaces a `device_mesh` by one of its own, which has one dimension
    unless this says how many copies there are.  The last dimension is that of neighbours, which fast links join."""

    replicate: int = 1

    @property
    def data_parallel_replicate_degree(self) -> Optional[int]:
        return self.replicate if self.replicate > 1 else None


def fsdp2_config(config: FsdpConfig) -> FSDP2Config:
    """Composer's configuration."""
    return _Sharding(
        replicate=config.replicate,
        reshard_after_forward=config.reshard_after_forward,
        activation_checkpointing=bool(config.activation_checkpointing),
        activation_cpu_offload=config.activation_cpu_offload,
        state_dict_type=config.state_dict_type,
        mixed_precision=config.mixed_precision,
    )


def unwrapped_name(name: str) -> str:
    """The name of a module or parameter before it was wrapped for recomputation or by DDP."""
    return '.'.join(part for part in name.removeprefix('module.').split('.') if part != '_checkpoint_wrapped_module')


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the other ranks' shards, if it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_up_units(model: nn.Module, config: FsdpConfig) -> str:
    """Once Composer has sharded a model, and before its first forward: what has to stay float32 is not rounded, and
    units gather the weights of the next ones in time, as `prefetch` says.

    Composer 0.32.1 gives every FSDP2 unit one `MixedPrecisionPolicy`, which in 16-bit precisions rounds its weights and
    inputs: a temperature of 100 to 98.9.  Here, a unit of scalars alone keeps them, and one for which its model's
    ``fsdp_float32_inputs_fn`` returns True takes its inputs as they are.  torch reads the policies when the model first
    runs: 2.7 that of a unit, 2.15 those of its parameters.

    Returns:
        One line on what is sharded and recomputed.

    Raises:
        ConfigError: Recomputation was asked for, and the model has no module for it.
    """
    recomputed = [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
    if config.activation_checkpointing and not recomputed:
        raise ConfigError('fsdp.activation_checkpointing: this model has no repeated blocks that could be recomputed; '
                          'leave it out')
    for child in model.children():  # each of which Composer makes a tree of units by itself
        units: list[FSDPModule] = [module for module in child.modules() if isinstance(module, FSDPModule)]
        takes_float32 = getattr(child, 'fsdp_float32_inputs_fn', lambda module: False)
        for i, unit in enumerate(units):
            state = unit._get_fsdp_state()
            group: Any = state._fsdp_param_group
            if group is not None and all(param._orig_size.numel() == 1 for param in group.fsdp_params):
                state._mp_policy = group.mp_policy = MixedPrecisionPolicy()
                for param in group.fsdp_params:
                    param.mp_policy = state._mp_policy
            elif takes_float32(unit):
                state._mp_policy = dataclasses.replace(state._mp_policy, cast_forward_inputs=False)
            if config.prefetch is not None:
                unit.set_modules_to_forward_prefetch(units[i + 1:i + 1 + config.prefetch])
                unit.set_modules_to_backward_prefetch(units[max(0, i - config.prefetch):i][::-1])
    names = [unwrapped_name(name) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    again = f', {len(recomputed)} of which are recomputed in the backward pass' if recomputed else ''
    return f'FSDP2 shards {len(names)} modules one by one, from {names[0]} to {names[-1]}{again}'


def compile_blocks(model: ComposerModel, **arguments: Any) -> None:
    """Compile every repeated block of a model that is not sharded or wrapped yet, in place, when it first runs.

    Blocks of one kind share what was compiled for the first of them.  What stands between them runs as before: FSDP2's
    gathering of weights, recomputation, patch dropout, GradCache's two passes, the loss.
    """
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for child in model.children():
        # What a part calls its blocks, or else shards on its own.
        is_block: Any = getattr(child, 'is_block', getattr(child, 'fsdp_wrap_fn', None))
        for module in child.modules():
            if is_block is not None and is_block(module):
                module.compile(**arguments)


def save_trainable_only(model: ComposerModel, part: str = '') -> None:
    """Leave the frozen weights of a model, or of one of its parts, out of its state dict, and hence of checkpoints.

    They are those of a pretrained model, gigabytes that every checkpoint would repeat.  Load with ``strict=False``
    (`Trainer(load_strict_model_weights=False)`): a checkpoint that lacks another weight, or has an unknown one, is an
    error all the same.
    """
    def left_out(module: nn.Module, names: Any) -> set[str]:
        trainable = {unwrapped_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad}
        begin = f'{part}.' if part else ''
        return {name for name in names if unwrapped_name(name).startswith(begin)
                and unwrapped_name(name) not in trainable}

    def drop_frozen(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if module.should_save_peft_only:
            for name in left_out(module, [name.removeprefix(prefix) for name in state if name.startswith(prefix)]):
                del state[prefix + name]

    def check_loaded(module: nn.Module, keys: Any) -> None:
        missing = sorted({*keys.missing_keys} - left_out(module, keys.missing_keys))
        if missing or keys.unexpected_keys:
            raise ValueError(f'the checkpoint is of another model: it lacks {[*map(unwrapped_name, missing)][:3]} and '
                             f'has {list(keys.unexpected_keys)[:3]} besides')

    # Composer's own name; it turns it off while it hands the weights of rank 0 to the others.
    vars(model)['should_save_peft_only'] = True
    model.register_state_dict_post_hook(drop_frozen)
    model.register_load_state_dict_post_hook(check_loaded)
