# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What an evaluation set is, whichever files it was read from."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ['ClassificationSet', 'RetrievalSet']


@dataclass(frozen=True)
class RetrievalSet:
    """Images with their captions: every caption belongs to one image."""

    name: str
    image_ids: list[str]
    """Unique, in the published order."""
    captions: list[list[str]]
    """The captions of each image, stripped of white space; an image without captions does not count."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""


@dataclass(frozen=True)
class ClassificationSet:
    """Images with one class each."""

    name: str
    image_ids: list[str]
    labels: list[int]
    """The position in `classes` of each image's class."""
    classes: list[str]
    """Class names as prompts use them."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""
