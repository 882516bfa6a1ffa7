# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whether the blocks of a model have to be recomputed in the backward pass for a step to fit its GPU."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import torch

from llm2clip.config import InheritanceConfig, Stage2Config, TrainConfig
from llm2clip.planning.hardware import GPU

__all__ = ['settle_for_this_gpu', 'settle_recomputation']

T = TypeVar('T')
Config = TypeVar('Config', bound=TrainConfig)


def settle_for_this_gpu(config: Config) -> Config:
    """`settle_recomputation` for a training that begins; rank 0 says what was decided."""
    if 'auto' not in _switches(config).values():
        return config
    from composer.utils import dist

    from llm2clip.planning.plan import plan_inheritance, plan_stage1, plan_stage2
    from llm2clip.planning.pretended import pretended_ranks

    gpu = None
    if config.device != 'cpu' and torch.cuda.is_available():
        gpu = GPU(torch.cuda.get_device_properties(0).total_memory / 2**30, 0, 0)
    with pretended_ranks(dist.get_world_size()):
        plans: dict[type, Callable[[Any], Any]] = {Stage2Config: plan_stage2, InheritanceConfig: plan_inheritance}
        plan = plans.get(type(config), plan_stage1)
        settled, said, _ = settle_recomputation(config, plan, gpu)
    if said and dist.get_global_rank() == 0:
        print(said, flush=True)
    return settled


def settle_recomputation(config: T, plan: Callable[[Any], Any], gpu: Optional[GPU]) -> tuple[T, str, Any]:
    """Replace ``auto`` by what has to be.

    Args:
        config: Of a training or an extraction.
        plan: Of its recipe.
        gpu: What the step has to fit; without one, nothing is recomputed.

    Returns:
        The configuration, a line that says why, and its plan, or None if that did not have to be made.
    """
    keys = [key for key, value in _switches(config).items() if value == 'auto']
    off = _with_recomputation(config, False)
    if not keys or gpu is None:
        return off, '', None
    planned = plan(off)
    if planned.cost is None:  # what is wrong with the configuration is said later
        return off, '', planned
    fits = gpu.fits(planned.cost.peak)
    said = (f'{" and ".join(keys)}: {"off" if fits else "on"}, since a step without takes '
            f'{planned.cost.peak / 2**30:.1f} GiB of the {gpu.memory:.0f} of a GPU')
    return (off, said, planned) if fits else (_with_recomputation(config, True), said, None)


def _switches(config: Any) -> dict[str, Any]:
    """Key -> value of what switches recomputation."""
    keys = {}
    if isinstance(config, Stage2Config):
        keys['model.vision.gradient_checkpointing'] = config.model.vision.gradient_checkpointing
    if isinstance(config, TrainConfig) and config.fsdp is not None:
        keys['fsdp.activation_checkpointing'] = config.fsdp.activation_checkpointing
    return keys


def _with_recomputation(config: Any, on: bool) -> Any:
    """A copy in which `on` stands for ``auto``, of FSDP's switch alone where both say so."""
    switches, config = _switches(config), copy.deepcopy(config)
    if switches.get('fsdp.activation_checkpointing') == 'auto':
        config.fsdp = dataclasses.replace(config.fsdp, activation_checkpointing=on)
        on = False
    if switches.get('model.vision.gradient_checkpointing') == 'auto':
        config.model.vision.gradient_checkpointing = on
    return config
