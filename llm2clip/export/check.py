# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What was exported, against what was trained."""

from collections.abc import Callable

import torch

from llm2clip.config import ConfigError

__all__ = ['TOLERANCE', 'check_same', 'noise']

TOLERANCE = 1e-5


def noise(*shape: int) -> torch.Tensor:
    """Normal noise, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_same(
    found: Callable[[torch.Tensor], torch.Tensor],
    expected: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    what: str,
) -> None:
    """Raise a ConfigError unless both functions give the same features, to `TOLERANCE` of the largest."""
    want = expected(inputs)
    got = found(inputs)
    difference = float('inf')
    if got.shape == want.shape:
        difference = ((got - want).abs().max() / want.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ConfigError(f'{what}: the features differ from those of the checkpoint, by {difference:.1e} of the '
                          f'largest (shapes {tuple(got.shape)} and {tuple(want.shape)})')
