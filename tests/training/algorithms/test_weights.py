# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Algorithms on weights after a step."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import Event

from llm2clip.training.algorithms.weights import ClampLogitScale


def test_the_factor_on_similarities_stays_between_1_and_100() -> None:
    for value, expected in ((-0.5, 0.0), (2.0, 2.0), (9.0, math.log(100))):
        model = torch.nn.Module()
        model.logit_scale = torch.nn.Parameter(torch.tensor([value]))
        model.weight = torch.nn.Parameter(torch.tensor([-0.5]))
        state: Any = SimpleNamespace(model=model)
        ClampLogitScale().apply(Event.BATCH_END, state, state)
        torch.testing.assert_close(model.logit_scale.data, torch.tensor([expected]))
        assert model.weight.item() == -0.5
