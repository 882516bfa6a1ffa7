# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen BatchNorm as a part of the convolution before it.

With the mean μ and the variance σ² of its pretraining, BatchNorm scales and shifts each channel.  A convolution can do
that itself, by the weight w·γ/√(σ² + ε) and the bias β + (b − μ)·γ/√(σ² + ε).  Parameters, their names and their
gradients stay what they were.  What is saved is BatchNorm's passes over the activations, and their memory.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn as nn
from timm.layers.conv2d_same import Conv2dSame, conv2d_same  # pyright: ignore[reportPrivateImportUsage]
from timm.layers.norm_act import BatchNormAct2d
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ['merge_frozen_batch_norms']


def merge_frozen_batch_norms(trunk: nn.Module, image_size: int) -> int:
    """Let every convolution whose output goes into a BatchNorm, and nowhere else, do what that does.

    From now on the BatchNorms have to stay in evaluation.

    Args:
        trunk: A network in evaluation, changed in place.
        image_size: Side of its input, in pixels.

    Returns:
        How many BatchNorms there are no more.
    """
    pairs = _pairs(trunk, image_size) if any(type(module) in _NORMS for module in trunk.modules()) else []
    for conv, norm in pairs:
        conv.__class__ = _CONVOLUTIONS[type(conv)]
        conv.batch_norm = [norm]  # in a list, so that its parameters do not become the convolution's
        norm.__class__ = _NORMS[type(norm)]
    return len(pairs)


class _Merged:
    """A convolution's weight and bias after its BatchNorm."""

    weight: torch.Tensor
    bias: Any
    batch_norm: list[Any]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm, = self.batch_norm
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        center = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        return self.weight * scale[:, None, None, None], norm.bias - center * scale


class _MergedConv2d(_Merged, nn.Conv2d):

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, *self.merged())


class _MergedConv2dSame(_Merged, Conv2dSame):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        how: list[Any] = [self.stride, self.padding, self.dilation, self.groups]
        return conv2d_same(x, *self.merged(), *how)


class _NoBatchNorm2d(nn.BatchNorm2d):

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


class _NoBatchNormAct2d(BatchNormAct2d):
    drop: Any
    act: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(x))


_CONVOLUTIONS: dict[Any, Any] = {nn.Conv2d: _MergedConv2d, Conv2dSame: _MergedConv2dSame}
_NORMS: dict[Any, Any] = {nn.BatchNorm2d: _NoBatchNorm2d, BatchNormAct2d: _NoBatchNormAct2d}


class _Uses(TorchFunctionMode):
    """Counts the operations that a tensor goes into, and keeps all tensors, whose ids would otherwise come again."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}
        self._kept: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):  # and not a shape
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.counts[id(leaf)] = self.counts.get(id(leaf), 0) + 1
        self._kept += [args, kwargs, result]
        return result


def _pairs(trunk: nn.Module, image_size: int) -> list[tuple[Any, Any]]:
    """Convolutions and the BatchNorms after them, of which each runs once; found without computing anything."""
    weights = {name: torch.empty_like(tensor, device='meta')
               for name, tensor in chain(trunk.named_parameters(), trunk.named_buffers())}
    image = torch.empty(1, 3, image_size, image_size, dtype=next(trunk.parameters()).dtype, device='meta')
    made_by: dict[int, nn.Module] = {}
    found: list[tuple[Any, Any, int]] = []
    runs: list[nn.Module] = []

    def after_convolution(conv: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        made_by[id(output)] = conv
        runs.append(conv)

    def before_norm(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        conv = made_by.get(id(inputs[0]))
        if conv is not None and norm.affine and norm.track_running_stats:
            found.append((conv, norm, id(inputs[0])))
        runs.append(norm)

    hooks = [module.register_forward_hook(after_convolution) for module in trunk.modules()
             if type(module) in _CONVOLUTIONS]
    hooks += [module.register_forward_pre_hook(before_norm) for module in trunk.modules() if type(module) in _NORMS]
    try:
        with torch.no_grad(), _Uses() as uses:
            functional_call(trunk, weights, (image,))
    finally:
        for hook in hooks:
            hook.remove()
    return [(conv, norm) for conv, norm, output in found
            if uses.counts[output] == 1 and runs.count(conv) == runs.count(norm) == 1]
