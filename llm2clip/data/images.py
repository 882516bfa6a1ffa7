# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image files, and decoding of images of any format and colour mode to upright RGB."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from PIL import Image
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
