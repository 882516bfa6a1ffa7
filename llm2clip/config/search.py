# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`search`."""

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from llm2clip.config.ranges import Count, DeviceName, Natural, TeacherPrecision, Text

__all__ = ['SearchConfig']


@dataclass
class SearchConfig:
    """Images of a folder, found by a text or an image."""

    model: Text = MISSING
    """Folder that `export_hf` wrote."""
    trust_remote_code: bool = False
    """Run code that comes with a sentence-transformers model in that folder. Leave off unless you have read that
    code."""
    images: Text = MISSING
    """Folder of images, with those in it."""
    index: Text = 'runs/search'
    """Folder for the features of the images, which are of one model and one folder of images."""
    query: Any = None
    """A text, the path of an image file, or a list of them.  Unset: images are only embedded."""
    top: Count = 10
    """Images per query."""
    batch_size: Count = 64
    """Images per forward pass."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for forward passes in bfloat16, of images as well as of texts."""
    dim: Optional[Count] = None
    """How many dimensions of the features are used, the first ones (see `loss.dims`).  Unset: all."""
    num_workers: Natural = 2
    """Processes that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
