# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The device of a command, and what of the process is set for it."""

import ctypes
from typing import Optional

import torch
from composer.devices import Device
from composer.utils import get_device

__all__ = ['open_device']

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def open_device(name: Optional[str], precision: Optional[str] = 'fp32') -> Device:
    """The device of a command.

    On a GPU, TF32 is off if the precision is ``fp32``; Composer 0.32.1 always turns it on.  On a CPU, the process keeps
    the memory that tensors leave behind.

    Args:
        name: ``gpu`` or ``cpu``.  None: a GPU if there is one.
        precision: As Composer names it.  None: as Composer chooses, 16 bits on a GPU.
    """
    device = get_device(name)
    if device.name == 'gpu':
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != 'fp32'
    elif device.name == 'cpu':
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Let glibc's malloc, where there is one, use freed memory again in place of handing it back to the system.

    A large tensor otherwise has new pages each time, which the system fills with zeros when they are first touched:
    in a step of stage 2, a quarter of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
