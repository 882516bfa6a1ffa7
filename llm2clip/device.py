# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The device of a command, what a command sets for its process, and exact float32.

Other modules import Composer's devices and its contexts of a precision from here.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

import torch
from composer import core, devices, utils

from llm2clip.errors import ConfigError

T = TypeVar('T')
Device = devices.Device
get_precision_context = core.get_precision_context
# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def get_device(name: Optional[str]) -> Device:
    """Return ``gpu``, a ConfigError if there is none, or ``cpu``.  None: a GPU if there is one."""
    matmul_precision = torch.get_float32_matmul_precision()
    cudnn_tf32 = torch.backends.cudnn.allow_tf32
    try:
        device = utils.get_device(name)
    except ValueError:
        raise ConfigError(f'{name}, expected cpu; {why_no_gpu()}', key='device') from None
    # Composer 0.32.1 turns TF32 on.
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    return device


def why_no_gpu() -> str:
    """Return for an error why a command uses no GPU."""
    if torch.cuda.is_available():
        return 'there is a GPU, but device is cpu'
    if torch.version.cuda is None:
        return f'PyTorch {torch.__version__} was built without CUDA'
    return (f'PyTorch sees no GPU; nvidia-smi shows whether there is one, with a driver for CUDA '
            f'{torch.version.cuda}')


def set_up_process(device: Device, precision: Optional[str] = 'fp32') -> None:
    """Set TF32 of a GPU, or malloc on a CPU, for the rest of the process.

    TF32 is off if the precision is ``fp32``.  glibc's malloc keeps freed memory, because zero-filled new
    pages would take a quarter of a stage-2 step.

    Args:
        device: From `get_device`.
        precision: In Composer's notation.  None: Composer's default, 16 bits on a GPU.
    """
    if device.name == 'gpu':
        # Not `matmul.allow_tf32`: if the two disagree, torch 2.15 refuses to report it to `exact_float32`.
        torch.set_float32_matmul_precision('highest' if precision == 'fp32' else 'high')
        torch.backends.cudnn.allow_tf32 = precision != 'fp32'
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Disable autocast, which would round logits of up to 100 to 8 significant bits, and TF32 (to 11 bits).

    TF32 is a setting of the process, read when an operation begins.  The backward pass runs after the block;
    compute it inside the block if it has matrix products.
    """
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
