# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Encoded images -> upright RGB, whatever their format and colour mode."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from llm2clip.data.image_processing_llm2clip import upright_rgb

__all__ = ['Preprocessing', 'crop_image', 'decode_image', 'decode_pixels', 'encode_image', 'open_image']

# Pillow reads more formats, but for EPS it starts another program, and decoders that few people use are weak.  'JPEG'
# includes JPEGs that hold several pictures, as phones write them (MPO).
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF', 'PPM')
# Larger images are refused before they are decoded: a few kilobytes can unfold into gigabytes.
MAX_PIXELS = 100_000_000
# Of a JPEG: the shortest Huffman code has one bit, and there is one at least for 64 pixels.
_MAX_PIXELS_PER_BYTE = 512
# What libjpeg leaves where data are missing, also in CMYK.
_UNTOUCHED = {(128, 128, 128), (64, 64, 64)}


@dataclass(frozen=True)
class Preprocessing:
    """RGB in [0, 1], shortest side resized to `image_size`, square crop, then normalised by `mean` and `std`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_image(data: bytes) -> Image.Image:
    """`PIL.Image.open` of an encoded image: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def decode_image(data: bytes, sample_id: str) -> Image.Image:
    """Decode to RGB.

    The image is turned upright by its EXIF orientation, transparent parts lie on white, 16-bit greys are scaled to 8
    bits, and of an animation the first frame counts.

    Raises:
        ValueError: The bytes are not an image that can be decoded, a part of it is missing, or it has more than
            `MAX_PIXELS`; names the sample.
    """
    with _open(data, sample_id) as image:
        return _whole(data, image, upright_rgb)


def crop_image(data: bytes, sample_id: str, box: tuple[float, float, float, float]) -> Image.Image:
    """A part of an image in RGB, of the pixels as they are stored: its EXIF orientation is not taken into account.

    Arguments and errors are those of `decode_image`, and `box` is the left, upper, right and lower border in pixels.
    What is outside of the image is black.
    """
    with _open(data, sample_id) as image:
        whole = _whole(data, image, lambda image: image.convert('RGB'))
        return whole.crop(box)  # pyright: ignore[reportArgumentType]


def decode_pixels(data: bytes, sample_id: str, at_least: Optional[int] = None) -> torch.Tensor:
    """`decode_image` as ``(3, H, W)`` uint8, with the same errors.

    Args:
        data, sample_id: As for `decode_image`.
        at_least: If the shortest side is at least twice that, a JPEG comes back at 1/2, 1/4 or 1/8 of its size, not
            smaller than that, which libjpeg does in the DCT domain.  Leave out for the full size.
    """
    def decode(image: Image.Image) -> Any:
        if image.format == 'JPEG' and image.mode in ('RGB', 'L') and at_least and min(image.size) >= 2 * at_least:
            scale = at_least / min(image.size)
            image.draft('RGB', (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        return pil_to_tensor(upright_rgb(image))

    with _open(data, sample_id) as image:
        return _whole(data, image, decode)


def _whole(data: bytes, image: Image.Image, decode: Callable[[Image.Image], Any]) -> Any:
    """The image, decoded; an error if the pixels of a JPEG end before its last ones, which libjpeg leaves grey."""
    sequential = image.format == 'JPEG' and not image.info.get('progressive')
    # Where the coded pixels begin, as long as they have not been read.
    scan = image.fp.tell() if sequential else 0  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    decoded = decode(image)
    if not sequential:
        return decoded
    # The last pixels are in one of the corners.
    if isinstance(decoded, torch.Tensor):
        corners = {tuple(decoded[:, y, x].tolist()) for x in (0, -1) for y in (0, -1)}
    else:
        corners = {decoded.getpixel((x, y)) for x in (0, decoded.width - 1) for y in (0, decoded.height - 1)}
    if corners & _UNTOUCHED and data.find(b'\xff\xda', scan) < 0:
        # Without its end marker, decoding goes on until there are no more data; a decoder looks a few bytes ahead.
        with open_image(data[:data.rfind(b'\xff\xd9')] + bytes(16)) as cut:
            cut.load()
    return decoded


@contextmanager
def _open(data: bytes, sample_id: str) -> Iterator[Image.Image]:
    try:
        with open_image(data) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f'{image.width} x {image.height} are more than {MAX_PIXELS:,} pixels')
            if image.format == 'JPEG' and image.width * image.height > _MAX_PIXELS_PER_BYTE * len(data):
                raise ValueError(f'{len(data):,} bytes are too few for {image.width} x {image.height} pixels')
            yield image
    except Exception as error:  # decoders raise errors of any kind
        why = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            why = f'expected {", ".join(_FORMATS)}'
        raise ValueError(f'the image of sample {sample_id!r} cannot be decoded: {why}') from None


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file in a format of Pillow's, with its options."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
