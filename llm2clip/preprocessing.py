# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a vision tower expects of its pixels."""

from dataclasses import dataclass

__all__ = ['Preprocessing']


@dataclass(frozen=True)
class Preprocessing:
    """RGB in [0, 1], shortest side resized to `image_size`, square crop, then normalised by `mean` and `std`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
