# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The device of a command, fast bfloat16, and exact float32.

Functions import PyTorch when they need it, because a configuration is read before.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar

from llm2clip.errors import ConfigError

if TYPE_CHECKING:
    from composer.devices import Device

T = TypeVar('T')
CPU_INFO = Path('/proc/cpuinfo')
# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def open_device(name: Optional[str], precision: Optional[str] = 'fp32') -> 'Device':
    """Return the device of a command.

    On a GPU, TF32 is off if the precision is ``fp32``; Composer 0.32.1 always turns it on.  On a CPU, glibc's
    malloc keeps freed memory, because zero-filled new pages would take a quarter of a stage-2 step.

    Args:
        name: ``gpu``, a ConfigError if there is none, or ``cpu``.  None: a GPU if there is one.
        precision: In Composer's notation.  None: Composer's default, 16 bits on a GPU.
    """
    import torch
    from composer.utils import get_device

    try:
        device = get_device(name)
    except ValueError as error:
        raise ConfigError(f'{name}, expected cpu: {error}', key='device') from None
    if device.name == 'gpu':
        # Not `matmul.allow_tf32`: if the two disagree, torch 2.15 refuses to report it to `exact_float32`.
        torch.set_float32_matmul_precision('highest' if precision == 'fp32' else 'high')
        torch.backends.cudnn.allow_tf32 = precision != 'fp32'
        return device
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    return device


def computes_bfloat16() -> bool:
    """Whether this machine has a GPU, or a processor with bfloat16 instructions according to Linux.

    On other processors, PyTorch 2.7 multiplies bfloat16 matrices more slowly than float32 ones: 58 times on
    an AMD EPYC with AVX2, and also with AVX-512 alone (pytorch#146508).
    """
    import torch

    if torch.cuda.is_available():
        return True
    return not {'avx512_bf16', 'amx_tile', 'bf16'}.isdisjoint(CPU_INFO.read_text().split())


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Disable autocast, which would round logits of up to 100 to 8 significant bits, and TF32 (to 11 bits).

    TF32 is a setting of the process, read when an operation begins.  The backward pass runs after the block;
    compute it inside the block if it has matrix products.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_float32(function: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function of tensors to run in `exact_float32`, on the device of the first tensor."""

    @functools.wraps(function)
    def run(tensor: Any, *args: Any, **kwargs: Any) -> T:
        with exact_float32(tensor.device.type):
            return function(tensor, *args, **kwargs)

    return run
