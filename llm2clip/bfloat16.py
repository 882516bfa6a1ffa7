# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Where bfloat16 is fast, and a warning where it is not."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ['computes_bfloat16', 'warn_of_slow_bfloat16']

CPU_INFO = Path('/proc/cpuinfo')


def computes_bfloat16() -> bool:
    """Whether this machine has a GPU, or a processor with instructions for bfloat16, as Linux lists them.

    On others, PyTorch 2.7 multiplies matrices of bfloat16 more slowly than those of float32: 58 times on an AMD EPYC
    with AVX2 alone, and up to 500 times in pytorch#146508.  AVX-512 without its extension for bfloat16 is slower too.
    """
    import torch

    if torch.cuda.is_available():
        return True
    return CPU_INFO.is_file() and not {'avx512_bf16', 'amx_tile', 'bf16'}.isdisjoint(CPU_INFO.read_text().split())


def warn_of_slow_bfloat16(config: Any) -> None:
    """Warn if a configuration computes in bfloat16 where that is slow.

    Args:
        config: One of the dataclasses of `llm2clip.config`.
    """
    slow = [f'{key}={value}' for key, value in _values(dataclasses.asdict(config))
            if key.endswith(('dtype', 'precision')) and value in ('bfloat16', 'amp_bf16')]
    if slow and not computes_bfloat16():
        warnings.warn(
            f'{", ".join(slow)}: this processor has no instructions for bfloat16, and is slower in it than in '
            'float32, 50 times with AVX2 alone; write ${if_bf16:bfloat16,float32}, or ${if_bf16:amp_bf16,fp32} for a '
            'precision, which takes what is fast', stacklevel=2)


def _values(node: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted key -> value, of every value below a mapping."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _values(value, f'{key}.{name}'.removeprefix('.'))
    else:
        yield key, node
