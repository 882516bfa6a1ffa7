# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LoRA layer that computes in the dtype of its input, while its weights stay in float32 (Hu et al. 2021,
arXiv 2106.09685, section 4.1)."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from peft.tuners.lora import Linear


class LoraLinear(Linear):
    """Linear layer of peft with LoRA, ``W x + B (s A x)``, without copies of its input in float32.

    peft casts the input to the dtype of the LoRA weights, float32, and multiplies the output by the scale s.
    Here the weights are cast to the dtype of the input, or of autocast, and the scale is applied to the r
    columns between A and B.  In float32, both give the same bits if s is a power of two.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.base_layer(x)
        for name in self.active_adapters:
            down: Any = self.lora_A[name].weight
            up: Any = self.lora_B[name].weight
            narrow = F.linear(self.lora_dropout[name](x), down.to(x.dtype)) * self.scaling[name]
            result = result + F.linear(narrow, up.to(x.dtype))
        return result


def compute_in_input_dtype(model: nn.Module) -> None:
    """Make the LoRA layers of linear projections, which peft has added to a model, `LoraLinear`."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear
