# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image files, decoding of images of any format and colour mode to upright RGB, and transforms of training.

The transforms work on tensors, ``(3, H, W)`` -> ``(3, image_size, image_size)``, both uint8: torchvision
resizes several times faster than Pillow, with differences of at most 2 of 255.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from llm2clip.io.files import reading
from llm2clip.modeling.image_processing_llm2clip import open_image, upright_rgb


@dataclass(frozen=True)
class Preprocessing:
    """Shortest side resized to `image_size` pixels, square crop, then RGB normalised by `mean` and `std`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_image_file(path: Union[str, Path]) -> bytes:
    """Return an encoded image; a FileError if it cannot be read."""
    with reading(path, 'an image'):
        return Path(path).read_bytes()


@dataclass(frozen=True)
class ImageFiles:
    """Reader of image files by position; picklable."""

    folder: str
    files: Sequence[str]

    def __call__(self, position: int) -> bytes:
        return read_image_file(Path(self.folder, self.files[position]))


def decode_image(data: bytes, sample_id: str) -> Image.Image:
    """Decode an image to RGB.

    The EXIF orientation is applied, transparent parts become white, and 16-bit greys are scaled to 8 bits.
    An animation gives its first frame.

    Raises:
        ValueError: The image cannot be decoded, is truncated, or has more than `MAX_PIXELS` pixels; the
            message names the sample.
    """
    with _open(data, sample_id) as image:
        return upright_rgb(image)


def decode_pixels(data: bytes, sample_id: str, at_least: float = math.inf) -> torch.Tensor:
    """Decode an image as `decode_image` does, with the same errors, to ``(3, H, W)`` uint8.

    Args:
        data, sample_id: As for `decode_image`.
        at_least: Smallest useful size of the shortest side, in pixels.  A JPEG of at least twice this size is
            decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does in the DCT domain.
    """
    with _open(data, sample_id) as image:
        shortest = min(image.size)
        if image.format == 'JPEG' and image.mode in ('RGB', 'L') and shortest >= 2 * at_least:
            scale = at_least / shortest
            image.draft('RGB', (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        return pil_to_tensor(upright_rgb(image))


@contextmanager
def _open(data: bytes, sample_id: str) -> Iterator[Image.Image]:
    try:
        with open_image(data) as image:
            yield image
    except Exception as error:  # decoders raise errors of any kind
        why = str(error) or type(error).__name__
        raise ValueError(f'the image of sample {sample_id!r} cannot be decoded: {why}') from error


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as a file in the Pillow format `kind`, with the options of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
