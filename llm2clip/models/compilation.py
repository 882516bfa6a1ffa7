# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`torch.compile` for a model's repeated blocks.

Not the whole model is compiled, as Composer's Trainer would do it, but each of its repeated blocks.  Blocks of one kind
share what was compiled for the first of them, however many there are.  What stands between the blocks runs as before:
FSDP2's gathering of weights, the recomputation of activations, patch dropout, GradCache's two passes, the loss.  The
modules stay the same, and so do the names in checkpoints.
"""

from typing import Any

import torch._dynamo
import torch.nn as nn
from composer.models import ComposerModel

__all__ = ['compile_blocks', 'repeated_blocks']

# Blocks of one class share this limit: those of a convolutional network differ in their shapes, and each is compiled
# once more for evaluation, for a pass without gradients, and for lengths of texts that vary.  torch's own limit of 8
# would leave the rest uncompiled.
_RECOMPILE_LIMIT = 256


def repeated_blocks(model: ComposerModel) -> list[nn.Module]:
    """What the parts of a model call their blocks, or else shard on its own."""
    blocks = []
    for child in model.children():
        is_block: Any = getattr(child, 'is_block', getattr(child, 'fsdp_wrap_fn', None))
        blocks += [module for module in child.modules() if is_block is not None and is_block(module)]
    return blocks


def compile_blocks(model: ComposerModel, **arguments: Any) -> None:
    """Compile every repeated block, in place, when it first runs.

    Args:
        model: Before it is sharded or wrapped.
        **arguments: Of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for block in repeated_blocks(model):
        block.compile(**arguments)
