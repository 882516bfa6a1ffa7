# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`search`."""

from dataclasses import dataclass
from typing import Any, Literal, Optional

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
    images: Optional[Text] = None
    """Folder of images, with those in it.  New, changed and removed files are brought into the index.  Unset: the index
    is searched as it is."""
    index: Text = 'runs/search'
    """Folder of the index, which is of one model and one folder of images."""
    query: Any = None
    """A text, the path of an image file, or a list of them.  Unset, the index is only brought up to date."""
    top: Count = 10
    """Images per query."""
    html: Optional[Text] = None
    """File for a page with the pictures."""
    batch_size: Count = 64
    """Images per forward pass."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for forward passes in bfloat16, of images as well as of texts."""
    dim: Optional[Count] = None
    """How many dimensions of the features are used, the first ones (see `loss.dims`).  Unset: all."""
    storage: Literal['float16', 'int8'] = 'float16'
    """How the index holds features: `float16`, or `int8` with one float32 scale per image, half the size."""
    num_workers: Natural = 2
    """Processes per rank that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
