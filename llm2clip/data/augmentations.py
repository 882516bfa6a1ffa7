# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image transforms of training, ``(3, H, W)`` -> ``(3, image_size, image_size)``, both uint8.

They work on tensors: torchvision resizes several times faster than Pillow, with differences of at most 2 of
255.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2


class _RandomCrop(v2.RandomResizedCrop):
    """torchvision's crop, with the box drawn in fractions of the image, independently of the decoded size."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        area = height * width
        low, high = map(math.log, self.ratio)
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
        y = round(top * (height - h))
        x = round(left * (width - w))
        return {'top': y, 'left': x, 'height': min(round(h), height - y), 'width': min(round(w), width - x)}


def train_transform(
    image_size: int, crop_scale: Sequence[float], color_jitter: float = 0.0, grayscale: float = 0.0,
    horizontal_flip: float = 0.0,
) -> v2.Compose:
    """Return the training transform to ``(3, image_size, image_size)``: a random crop, resized, with optional
    colour changes and mirroring.  `ImageDataConfig` describes the settings."""
    smallest, largest = crop_scale
    crop = _RandomCrop(image_size, scale=(smallest, largest), interpolation=InterpolationMode.BICUBIC)
    transforms: list[torch.nn.Module] = [crop]
    if grayscale:
        transforms.append(v2.RandomGrayscale(grayscale))
    if color_jitter:
        transforms.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 5))
    if horizontal_flip:
        transforms.append(v2.RandomHorizontalFlip(horizontal_flip))
    return v2.Compose(transforms)


def pixels_needed(image_size: int, crop_scale: float) -> int:
    """Return the shortest side, in pixels, that a decoded image needs.

    A square crop that keeps `crop_scale` of the area is then at least ``2 * image_size`` pixels wide, so that
    resizing it to `image_size` loses no detail.
    """
    return math.ceil(2 * image_size / math.sqrt(crop_scale))


def seeded(transform: v2.Compose, image: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply a random transform with its own seed, and leave the global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would format a stack trace on each call as long as CUDA is not initialised.
        torch.default_generator.manual_seed(seed)
        return transform(image)
