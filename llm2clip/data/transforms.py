# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image bytes -> pixels, and what training and evaluation do to them."""

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode, v2

from llm2clip.preprocessing import Preprocessing

__all__ = ['decode_image', 'eval_transform', 'seeded', 'train_transform']


def decode_image(data: bytes, sample_id: str) -> Image.Image:
    """Decode to RGB, upright by its EXIF orientation.

    Raises:
        ValueError: The bytes are not an image that can be decoded; names the sample.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'the image of sample {sample_id!r} cannot be decoded: {error}') from None


def _to_tensor(preprocessing: Preprocessing) -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocessing.mean), list(preprocessing.std))]


def train_transform(
    preprocessing: Preprocessing, crop_scale: Sequence[float], color_jitter: float = 0.0, grayscale: float = 0.0
) -> v2.Compose:
    """Random crop that keeps a share of the area in `crop_scale`, resized; optional colour changes.

    Args:
        preprocessing: Of the vision tower.
        crop_scale: Smallest and largest share.
        color_jitter: Strength of random brightness, contrast, saturation, and a fifth of it for hue.
        grayscale: Probability of dropping the colours.
    """
    crop = v2.RandomResizedCrop(
        preprocessing.image_size, scale=(crop_scale[0], crop_scale[1]), interpolation=InterpolationMode.BICUBIC)
    color: list[torch.nn.Module] = []
    if grayscale:
        color.append(v2.RandomGrayscale(grayscale))
    if color_jitter:
        color.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 5))
    return v2.Compose([crop, *color, *_to_tensor(preprocessing)])


def eval_transform(preprocessing: Preprocessing) -> v2.Compose:
    """Resize the shortest side, crop the centre."""
    size = preprocessing.image_size
    resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size), *_to_tensor(preprocessing)])


def seeded(transform: v2.Compose, image: Image.Image, seed: int) -> torch.Tensor:
    """Apply a random transform with its own seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)
