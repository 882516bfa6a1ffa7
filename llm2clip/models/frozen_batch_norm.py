# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen BatchNorm as a part of the convolution before it.

A convolution can do it itself, by the weight w·γ/√(σ² + ε) and the bias β + (b − μ)·γ/√(σ² + ε).  Parameters, their
names and gradients stay what they were.  BatchNorm's passes over the activations are saved, and their memory.
"""

from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn as nn
from timm.layers.conv2d_same import Conv2dSame, conv2d_same  # pyright: ignore[reportPrivateImportUsage]
from timm.layers.norm_act import BatchNormAct2d
from torch.func import functional_call

__all__ = ['merge_frozen_batch_norms']


def merge_frozen_batch_norms(trunk: nn.Module, image_size: int) -> int:
    """Let every convolution do what the BatchNorm behind it does, which has to stay in evaluation from now on.

    Args:
        trunk: A network in evaluation, changed in place.
        image_size: Side of its input, in pixels.

    Returns:
        How many BatchNorms there are no more.
    """
    pairs = _pairs(trunk, image_size)
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


def _pairs(trunk: nn.Module, image_size: int) -> list[tuple[Any, Any]]:
    """Neighbours of which the second, a BatchNorm, reads what the first computes, and each runs once."""
    neighbours: list[tuple[Any, Any]] = [
        (conv, norm) for module in trunk.modules() for conv, norm in pairwise(module.children())
        if type(conv) in _CONVOLUTIONS and type(norm) in _NORMS and norm.affine and norm.track_running_stats]
    if not neighbours:
        return []
    tensors: dict[nn.Module, list[torch.Tensor]] = {module: [] for pair in neighbours for module in pair}
    hooks = [hook for conv, norm in neighbours for hook in (
        conv.register_forward_hook(lambda module, inputs, output: tensors[module].append(output)),
        norm.register_forward_pre_hook(lambda module, inputs: tensors[module].append(inputs[0])))]
    weights = {name: torch.empty_like(tensor, device='meta')
               for name, tensor in chain(trunk.named_parameters(), trunk.named_buffers())}
    image = torch.empty(1, 3, image_size, image_size, dtype=next(trunk.parameters()).dtype, device='meta')
    with torch.no_grad():
        functional_call(trunk, weights, (image,))
    for hook in hooks:
        hook.remove()
    return [(conv, norm) for conv, norm in neighbours
            if len(tensors[conv]) == len(tensors[norm]) == 1 and tensors[conv][0] is tensors[norm][0]]
