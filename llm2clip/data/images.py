# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Decoding of images, of any format and colour mode, to upright RGB."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from llm2clip.data.image_processing_llm2clip import open_image, upright_rgb

__all__ = ['Preprocessing', 'decode_image', 'decode_pixels', 'encode_image']

# Colours that libjpeg leaves where data is missing, in RGB and CMYK.
_UNTOUCHED = {(128, 128, 128), (64, 64, 64)}


@dataclass(frozen=True)
class Preprocessing:
    """Shortest side resized to `image_size` pixels, square crop, then RGB in [0, 1] normalised by `mean` and `std`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def decode_image(data: bytes, sample_id: str) -> Image.Image:
    """Decode an image to RGB.

    The EXIF orientation is applied, transparent parts become white, and 16-bit greys are scaled to 8 bits.  An
    animation gives its first frame.

    Raises:
        ValueError: The image cannot be decoded, is truncated, or has more than `MAX_PIXELS` pixels; the message names
            the sample.
    """
    with _open(data, sample_id) as image:
        return _whole(data, image, upright_rgb)


def decode_pixels(data: bytes, sample_id: str, at_least: Optional[int] = None) -> torch.Tensor:
    """Decode an image as `decode_image` does, with the same errors, to ``(3, H, W)`` uint8.

    Args:
        data, sample_id: As for `decode_image`.
        at_least: Smallest useful size of the shortest side, in pixels.  A JPEG of at least twice this size is decoded
            at 1/2, 1/4 or 1/8 of its size, which libjpeg does in the DCT domain.  Unset, the size stays.
    """
    def decode(image: Image.Image) -> Any:
        if image.format == 'JPEG' and image.mode in ('RGB', 'L') and at_least and min(image.size) >= 2 * at_least:
            scale = at_least / min(image.size)
            image.draft('RGB', (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        return pil_to_tensor(upright_rgb(image))

    with _open(data, sample_id) as image:
        return _whole(data, image, decode)


def _whole(data: bytes, image: Image.Image, decode: Callable[[Image.Image], Any]) -> Any:
    """Decode an image; raise an error if a JPEG lacks its last pixels, which libjpeg leaves grey."""
    sequential = image.format == 'JPEG' and not image.info.get('progressive')
    # Offset of the coded pixels, which is known only before they are read.
    scan = image.fp.tell() if sequential else 0  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    decoded = decode(image)
    if not sequential:
        return decoded
    # The orientation may put the last pixels into any corner.
    if isinstance(decoded, torch.Tensor):
        corners = {tuple(decoded[:, y, x].tolist()) for x in (0, -1) for y in (0, -1)}
    else:
        corners = {decoded.getpixel((x, y)) for x in (0, decoded.width - 1) for y in (0, decoded.height - 1)}
    if corners & _UNTOUCHED and data.find(b'\xff\xda', scan) < 0:
        # Without the end marker, missing pixels are an error.  The zeros serve the decoder, which reads ahead.
        with open_image(data[:data.rfind(b'\xff\xd9')] + bytes(16)) as cut:
            cut.load()
    return decoded


@contextmanager
def _open(data: bytes, sample_id: str) -> Iterator[Image.Image]:
    try:
        with open_image(data) as image:
            yield image
    except Exception as error:  # decoders raise errors of any kind
        why = str(error) or type(error).__name__
        raise ValueError(f'the image of sample {sample_id!r} cannot be decoded: {why}') from None


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as a file in the Pillow format `kind`, with the options of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
