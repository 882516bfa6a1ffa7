# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LoRA layers against those of peft: outputs, gradients, and the tensors kept for the backward pass."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, inject_adapter_in_model

from llm2clip.teacher.lora import LoraLinear, compute_in_input_dtype


def _layers(alpha: int = 8, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """Two layers with LoRA of rank 4, by peft and by this project, with the same weights."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).to(dtype)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=alpha, target_modules=['0', '2']), model)
    for name, weight in model.named_parameters():
        if 'lora_' in name:
            weight.data = 0.1 * torch.randn(weight.shape)
    ours = copy.deepcopy(model)
    compute_in_input_dtype(ours)
    assert [type(layer) for layer in ours if layer is not ours[1]] == [LoraLinear, LoraLinear]
    return model, ours


def _results(model: nn.Module, inputs: torch.Tensor, autocast: bool = False) -> list[Any]:
    """Return output, gradient of the input, and gradients of the LoRA weights."""
    inputs = inputs.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16) if autocast else nullcontext():
        output = model(inputs)
    output.float().square().sum().backward()
    grads = [inputs.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)]
    assert len(grads) == 5
    return [output, *grads]


def _error(results: list[Any], expected: list[Any]) -> float:
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, expected)]
    return max(errors)


def _dtypes_of_kept_activations(model: nn.Module, inputs: torch.Tensor) -> set[torch.dtype]:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs)
    return {tensor.dtype for tensor in kept if tensor.shape[0] == len(inputs)}


@pytest.mark.parametrize(('dtype', 'autocast', 'alpha', 'rounding'), [
    (torch.float32, True, 8, 0), (torch.bfloat16, True, 8, 0), (torch.float32, False, 8, 0),
    (torch.float32, False, 7, 1e-5)])  # a scale that is no power of two
def test_bits_are_those_of_peft(dtype: torch.dtype, autocast: bool, alpha: int, rounding: float) -> None:
    theirs, ours = _layers(alpha, dtype)
    inputs = torch.randn(7, 32, dtype=dtype)
    for a, b in zip(_results(ours, inputs, autocast), _results(theirs, inputs, autocast)):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def test_a_bfloat16_layer_rounds_as_under_autocast() -> None:
    theirs, ours = _layers(dtype=torch.bfloat16)
    inputs = torch.randn(64, 32, dtype=torch.bfloat16)
    exact = _results(copy.deepcopy(theirs).float(), inputs.float())
    assert _error(_results(ours, inputs), exact) <= _error(_results(theirs, inputs, autocast=True), exact) < 0.02


def test_no_activation_is_kept_in_float32() -> None:
    theirs, ours = _layers(dtype=torch.bfloat16)
    inputs = torch.randn(7, 32, dtype=torch.bfloat16)
    assert torch.float32 in _dtypes_of_kept_activations(theirs, inputs)
    assert _dtypes_of_kept_activations(ours, inputs) == {torch.bfloat16}


def test_disabled_and_merged_layers_are_those_of_peft() -> None:
    theirs, ours = _layers()
    inputs = torch.randn(7, 32)
    expected = theirs(inputs)
    layers: list[Any] = [layer for layer in ours if isinstance(layer, LoraLinear)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(ours(inputs), expected, rtol=1e-5, atol=1e-5)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    assert not torch.allclose(ours(inputs), expected, atol=1e-3)
