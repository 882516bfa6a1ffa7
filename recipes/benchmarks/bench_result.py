# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What each benchmark of this folder writes."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ['BENCH_FOLDER', 'write_result']

BENCH_FOLDER = Path('runs/bench')


def write_result(
    name: str, what: str, against: str, ratio: float, bound: float, meets: bool, medians: Mapping[str, Any]
) -> None:
    """Write `runs/bench/<name>.json`.

    Args:
        name: Of the benchmark.
        what: What is measured.
        against: What it is compared with, in the same run.
        ratio: The first over the second.
        bound: Of the ratio.
        meets: Whether the ratio keeps to it.
        medians: The raw numbers.
    """
    BENCH_FOLDER.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.platform()
    result = {'name': name, 'what': what, 'against': against, 'ratio': ratio, 'bound': bound, 'meets': meets,
              'medians': dict(medians), 'machine': machine}
    (BENCH_FOLDER / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
