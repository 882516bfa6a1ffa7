# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What training does to pixels, ``(3, H, W)`` -> ``(3, image_size, image_size)``, both uint8; the vision encoder
normalises them on its device.

On tensors: torchvision resizes them several times faster than Pillow does, to the same values (they differ by at most 2
of 255).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

__all__ = ['Preprocessing', 'pixels_needed', 'seeded', 'train_transform']


@dataclass(frozen=True)
class Preprocessing:
    """RGB in [0, 1], shortest side resized to `image_size`, square crop, then normalised by `mean` and `std`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _RandomCrop(v2.RandomResizedCrop):
    """torchvision's, with the box drawn as fractions of the image: its place does not depend on the size at which the
    image was decoded."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        area, (low, high) = height * width, (math.log(self.ratio[0]), math.log(self.ratio[1]))
        draws = torch.rand(10, 2).tolist()
        top, left = torch.rand(2).tolist()
        for scale, ratio in draws:
            target = area * (self.scale[0] + scale * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + ratio * (high - low))
            w, h = math.sqrt(target * aspect), math.sqrt(target / aspect)
            if w <= width and h <= height:
                break
        else:  # no crop of these shapes fits: the largest in the middle
            w, h = min(width, height * self.ratio[1]), min(height, width / self.ratio[0])
            top = left = 0.5
        box = {'top': round(top * (height - h)), 'left': round(left * (width - w))}
        return {**box, 'height': min(round(h), height - box['top']), 'width': min(round(w), width - box['left'])}


def train_transform(
    image_size: int, crop_scale: Sequence[float], color_jitter: float = 0.0, grayscale: float = 0.0,
    horizontal_flip: float = 0.0,
) -> v2.Compose:
    """Random crop that keeps a share of the area in `crop_scale`, resized; optional changes of colour and side.

    Args:
        image_size: Side of the square that the vision tower sees.
        crop_scale: Smallest and largest share.
        color_jitter: Strength of random brightness, contrast, saturation, and a fifth of it for hue.
        grayscale: Probability of dropping the colours.
        horizontal_flip: Probability of mirroring.
    """
    crop = _RandomCrop(image_size, scale=(crop_scale[0], crop_scale[1]), interpolation=InterpolationMode.BICUBIC)
    more: list[torch.nn.Module] = []
    if grayscale:
        more.append(v2.RandomGrayscale(grayscale))
    if color_jitter:
        more.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 5))
    if horizontal_flip:
        more.append(v2.RandomHorizontalFlip(horizontal_flip))
    return v2.Compose([crop, *more])


def pixels_needed(image_size: int, crop_scale: float) -> int:
    """The shortest side, in pixels, that an image has to be decoded at.

    A random crop that keeps `crop_scale` of the area is then still at least ``2 * image_size`` pixels wide, and
    resizing it to `image_size` loses no detail.
    """
    return math.ceil(2 * image_size / math.sqrt(crop_scale))


def seeded(transform: v2.Compose, image: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply a random transform with its own seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which formats a stack trace each time in case that CUDA is not there yet.
        torch.default_generator.manual_seed(seed)
        return transform(image)
