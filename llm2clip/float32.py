# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Where float32 is whole: no autocast and no TF32, the 19-bit format in which newer GPUs multiply float32 matrices.

With ``precision: fp32``, everything is.  With a 16-bit precision, autocast leaves a few of a model's products in
float32, for which TF32 is more than good enough; losses, metrics and a teacher of ``precision: fp32`` in the loop are
whole all the same.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ['exact_float32', 'in_float32']

T = TypeVar('T')


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """No autocast, which would round logits of up to 100 to 8 significant bits, and no TF32, which would to 11.

    TF32 is a setting of the process that counts when an operation is begun.  The backward pass of what is computed in
    the block runs after it: where that has matrix products too, they belong into the block.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_float32(function: Callable[..., T]) -> Callable[..., T]:
    """Run a function of tensors in `exact_float32`, on the device of the first."""

    @functools.wraps(function)
    def run(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> T:
        with exact_float32(tensor.device.type):
            return function(tensor, *args, **kwargs)

    return run
