# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Where the tests of `gpu/` run."""

import os
from collections.abc import Callable
from pathlib import Path

DEVICE = os.environ.get('DEVICE', 'gpu')
"""As recipes name it."""
Train = Callable[..., Path]
"""Stage, name of the run and arguments -> its folder, after a small training there."""


def on_cpu(*args: str) -> list[str]:
    """The same in float32 on the CPU."""
    return [*args, 'device=cpu', 'precision=fp32']
