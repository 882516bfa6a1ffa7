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
    """Of each image, without white space around them; an image that has none does not count."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""


@dataclass(frozen=True)
class ClassificationSet:
    """Images with one class each."""

    name: str
    image_ids: list[str]
    labels: list[int]
    """Of each image, its class's position in `classes`."""
    classes: list[str]
    """Class names as prompts use them."""
    read_image: Callable[[int], bytes]
    """Encoded image of a position; can be pickled."""
