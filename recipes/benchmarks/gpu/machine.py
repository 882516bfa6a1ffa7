# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which GPU and which versions: machine.py gpu|cpu prints them as JSON, or exits with 1 if there is no such device."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from typing import Any, Optional

import torch
import torch.version

from llm2clip.planning.summary import GPUS

__all__ = ['about', 'peak_of']


def about(device: str) -> dict[str, Any]:
    """Names, sizes and versions of this machine."""
    found: dict[str, Any] = {'device': 'cpu'}
    if device == 'gpu':
        free, total = torch.cuda.mem_get_info()
        found = {'device': torch.cuda.get_device_name(), 'gib': total / 2**30, 'free_gib': free / 2**30,
                 'capability': torch.cuda.get_device_capability(), 'driver': _driver(),
                 'cudnn': torch.backends.cudnn.version()}
    versions = {name: importlib.metadata.version(name) for name in ('mosaicml', 'transformers')}
    return {**found, 'cores': len(os.sched_getaffinity(0)), 'torch': torch.__version__, 'cuda': torch.version.cuda,
            **versions, 'commit': _commit(), 'date': time.strftime('%Y-%m-%d %H:%M:%S%z')}


def peak_of(device: str) -> Optional[float]:
    """Dense bfloat16 peak of a GPU by its name, TFLOP/s; None of one that `GPUS` does not know.

    Those are SXM boards.  Of the cards for other slots, only the A100 has the same peak.
    """
    kind = re.search(r'\b(A100|H100|H200|B200)\b', device)
    if kind is None or 'NVL' in device or ('PCIe' in device and kind[0] != 'A100'):
        return None
    return GPUS[kind[0]].bf16


def _driver() -> Optional[str]:
    import pynvml
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _commit() -> Optional[str]:
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True, check=True
                              ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == '__main__':
    if sys.argv[1] == 'gpu' and not torch.cuda.is_available():
        sys.exit(f'torch {torch.__version__} for CUDA {torch.version.cuda} finds no NVIDIA GPU here')
    print(json.dumps(about(sys.argv[1])))
