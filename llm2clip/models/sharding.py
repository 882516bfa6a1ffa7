# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Operations on a model's modules: FSDP2, compilation of blocks, checkpoints without frozen weights."""

import dataclasses
from itertools import chain
from typing import Any, Optional

import torch
import torch._dynamo
import torch.nn as nn
from composer.models import ComposerModel
from composer.utils.parallelism import FSDP2Config
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from llm2clip.config import FsdpConfig
from llm2clip.models.llm2clip import LossModule

# Blocks of one class share this limit.  Blocks of a convolutional network differ in shape, and each block is
# compiled again for evaluation, for passes without gradients, and for varying sequence lengths.  torch's
# default of 8 would leave the rest uncompiled.
_RECOMPILE_LIMIT = 256


@dataclasses.dataclass
class _Sharding(FSDP2Config):
    """FSDP2 configuration with replicas of the model.

    Composer 0.32.1 replaces a `device_mesh` by its own one-dimensional mesh unless
    `data_parallel_replicate_degree` is set.  The last dimension shards over neighbouring ranks,
    which have fast links."""

    replicate: int = 1

    @property
    def data_parallel_replicate_degree(self) -> Optional[int]:
        return self.replicate if self.replicate > 1 else None


def fsdp2_config(config: FsdpConfig) -> FSDP2Config:
    """Convert to Composer's configuration."""
    return _Sharding(
        replicate=config.replicate,
        reshard_after_forward=config.reshard_after_forward,
        activation_checkpointing=bool(config.activation_checkpointing),
        activation_cpu_offload=config.activation_cpu_offload,
        state_dict_type=config.state_dict_type,
        mixed_precision=config.mixed_precision,
    )


def unwrapped_name(name: str) -> str:
    """Return the name of a module or parameter without the wrappers of activation checkpointing and DDP."""
    return name.removeprefix('module.').replace('._checkpoint_wrapped_module', '')


def without_ddp(model: Any) -> Any:
    """Return the model itself, which DDP may have wrapped."""
    return getattr(model, 'module', model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_up_units(model: nn.Module) -> str:
    """Set mixed precision of a model's FSDP2 units, after sharding and before the first forward pass.

    Composer 0.32.1 gives every FSDP2 unit the same `MixedPrecisionPolicy`, which rounds weights and inputs in
    16-bit precisions: a temperature of 100 becomes 98.9.  Here, a unit with only scalars stays float32, and
    so do the parameters of a loss.  A unit keeps the dtype of its inputs if ``fsdp_float32_inputs_fn`` of its
    model returns True.

    Returns:
        One line that summarises the sharded modules.
    """
    names = []
    for part, child in model.named_children():  # Composer makes a separate tree of units for each child
        takes_float32 = getattr(child, 'fsdp_float32_inputs_fn', lambda module: False)
        for name, unit in child.named_modules(prefix=part):
            if not isinstance(unit, FSDPModule):
                continue
            names.append(unwrapped_name(name))
            # PyTorch reads the policies in the first forward pass: version 2.7 the unit's,
            # 2.15 those of its parameters.
            state = unit._get_fsdp_state()
            group: Any = state._fsdp_param_group
            params = [] if group is None else group.fsdp_params
            is_scalar = all(param._orig_size.numel() == 1 for param in params)
            if group is not None and (is_scalar or isinstance(unit, LossModule)):
                state._mp_policy = group.mp_policy = MixedPrecisionPolicy()
                for param in params:
                    param.mp_policy = state._mp_policy
            elif takes_float32(unit):
                state._mp_policy = dataclasses.replace(state._mp_policy, cast_forward_inputs=False)
    return f'FSDP2 shards {len(names)} modules one by one, from {names[0]} to {names[-1]}'


def compile_blocks(model: ComposerModel, **arguments: Any) -> None:
    """Compile every repeated block of a model in place, at its first forward pass; call this before sharding.

    Blocks of one class share compiled code.  Everything between blocks stays eager: FSDP2's all-gathers,
    recomputation, patch dropout, GradCache's two passes, the loss.
    """
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    # DDP's own option would split blocks where its buckets of gradients end.
    torch._dynamo.config.optimize_ddp = False
    for child in model.children():
        # Without `is_block`, the FSDP units are the blocks; the head of MNTP and a learned scale have none.
        is_block: Any = getattr(child, 'is_block', getattr(child, 'fsdp_wrap_fn', lambda module: False))
        for module in filter(is_block, child.modules()):
            module.compile(**arguments)


def save_trainable_only(model: ComposerModel, part: str = '') -> None:
    """Exclude frozen weights and buffers of a model, or of its submodule `part`, from its checkpoints.

    They would repeat gigabytes of pretrained weights.  Load with ``strict=False``
    (`Trainer(load_strict_model_weights=False)`): other missing or unexpected weights still raise a
    ValueError.
    """
    def frozen(module: nn.Module) -> set[str]:
        names: set[str] = set()
        for wrapped_name, weight in chain(module.named_parameters(), module.named_buffers()):
            name = unwrapped_name(wrapped_name)
            if name.startswith(part) and not weight.requires_grad:
                names.add(name)
        return names

    def drop_frozen(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if module.should_save_peft_only:
            for name in frozen(module):
                state.pop(prefix + name, None)

    def check_loaded(module: nn.Module, keys: Any) -> None:
        missing = sorted(set(map(unwrapped_name, keys.missing_keys)) - frozen(module))
        if missing or keys.unexpected_keys:
            raise ValueError(f'the checkpoint is of another model: it lacks {missing[:3]} and has '
                             f'{list(keys.unexpected_keys)[:3]} besides')

    # Composer reads this attribute, and unsets it while it broadcasts the weights of rank 0.
    vars(model)['should_save_peft_only'] = True
    model.register_state_dict_post_hook(drop_frozen)
    model.register_load_state_dict_post_hook(check_loaded)
