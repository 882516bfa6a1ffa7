# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Encoded images -> upright RGB, whatever their format and colour mode."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from llm2clip.data.image_processing_llm2clip import orientation, upright_rgb

__all__ = [
    'MAX_PIXELS', 'crop_image', 'decode_image', 'decode_pixels', 'encode_image', 'open_image', 'unsupported_format',
]

# Pillow reads more formats, but for EPS it starts another program, and decoders that few people use are weak.  'JPEG'
# includes JPEGs that hold several pictures, as phones write them (MPO).
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF', 'PPM')
# Larger images are refused before they are decoded: a few kilobytes can unfold into gigabytes.
MAX_PIXELS = 100_000_000
# Of a JPEG: the shortest Huffman code has one bit, and there is one at least for 64 pixels.
_MAX_PIXELS_PER_BYTE = 512
# What libjpeg leaves where data are missing, also in CMYK.
_UNTOUCHED = {(128, 128, 128), (64, 64, 64)}
_SIGNATURES = {
    'HTML': re.compile(rb'(\xef\xbb\xbf)?\s*<(!doctype html|html)[\s>]', re.IGNORECASE),
    # Before its element may stand declarations and comments.
    'SVG': re.compile(rb'(\xef\xbb\xbf)?\s*(?=<).*?<svg[\s>]', re.DOTALL),
    'gzip (SVGZ)': re.compile(rb'\x1f\x8b'),
    'HEIC': re.compile(rb'.{4}ftyp(heic|heix|hevc|hevx|mif1|msf1)', re.DOTALL),
    'JPEG 2000': re.compile(rb'\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  '),
    'JPEG XL': re.compile(rb'\xff\x0a|\x00\x00\x00\x0cJXL '),
    'PDF': re.compile(rb'%PDF-'),
}


def open_image(data: bytes) -> Image.Image:
    """`PIL.Image.open` of an encoded image: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def decode_image(data: bytes, sample_id: str) -> Image.Image:
    """Decode to RGB.

    The image is turned upright by its EXIF orientation, transparent parts lie on white, 16-bit greys are scaled to 8
    bits, and of an animation the first frame counts.

    Args:
        data: In a format that `open_image` reads.
        sample_id: For messages.

    Raises:
        ValueError: The bytes are not an image that can be decoded, a part of it is missing, or it has more than
            `MAX_PIXELS`; names the sample.
    """
    with _open(data, sample_id) as image:
        scan = _scan(image)
        upright = upright_rgb(image)
        _check_whole(data, scan, _corners(upright))
        return upright


def crop_image(data: bytes, sample_id: str, box: tuple[float, float, float, float]) -> Image.Image:
    """A part of an image in RGB, of the pixels as they are stored: its EXIF orientation is not taken into account.

    Args:
        data: As for `decode_image`.
        sample_id: For messages.
        box: Left, upper, right and lower border in pixels.  What is outside of the image is black.

    Raises:
        ValueError: As `decode_image`.
    """
    with _open(data, sample_id) as image:
        scan = _scan(image)
        whole = image.convert('RGB')
        _check_whole(data, scan, _corners(whole))
        return whole.crop(box)  # pyright: ignore[reportArgumentType]


def _corners(image: Image.Image) -> set[Any]:
    """The colours of an image's corners."""
    right, bottom = image.width - 1, image.height - 1
    return {image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))}


def decode_pixels(data: bytes, sample_id: str, at_least: Optional[int] = None) -> torch.Tensor:
    """`decode_image` as ``(3, H, W)`` uint8.

    Args:
        data: As for `decode_image`.
        sample_id: For messages.
        at_least: If the shortest side is at least twice that, a JPEG comes back at 1/2, 1/4 or 1/8 of its size, not
            smaller than that, which libjpeg does in the DCT domain.  Leave out for the full size.

    Raises:
        ValueError: As `decode_image`.
    """
    with _open(data, sample_id) as image:
        scan = _scan(image)
        pixels = _decode(data, image, at_least)
        _check_whole(data, scan, {tuple(pixels[:, y, x].tolist()) for x in (0, -1) for y in (0, -1)})
        return pixels


def _decode(data: bytes, image: Image.Image, at_least: Optional[int]) -> torch.Tensor:
    if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
        if at_least and min(image.size) >= 2 * at_least:
            scale = at_least / min(image.size)
            image.draft('RGB', (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        elif orientation(image) == 1:
            # The same pixels as Pillow's, bit by bit, in up to a fifth less time.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)  # pyright: ignore[reportReturnType]
    return pil_to_tensor(upright_rgb(image))


def _scan(image: Image.Image) -> Optional[int]:
    """Where the coded pixels of a sequential JPEG begin, as long as they have not been read; None of other images."""
    if image.format != 'JPEG' or image.info.get('progressive'):
        return None
    return image.fp.tell()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _check_whole(data: bytes, scan: Optional[int], corners: set[Any]) -> None:
    """Raise an error if the coded pixels of a JPEG end before its last ones, which libjpeg leaves grey then.

    Args:
        data: Of the image.
        scan: As `_scan` gives it.
        corners: Colours of its corners, in one of which its last pixels are.
    """
    if scan is None or not corners & _UNTOUCHED or data.find(b'\xff\xda', scan) >= 0:
        return
    # Without its end marker, decoding goes on until there are no more data; a decoder looks a few bytes ahead.
    with open_image(data[:data.rfind(b'\xff\xd9')] + bytes(16)) as image:
        image.load()


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


def unsupported_format(data: bytes) -> Optional[str]:
    """What the file is, if it is no image or an image in a format that is not supported and can be told by its start.

    Args:
        data: A file that cannot be decoded.
    """
    head = data[:4096]
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(head)), None)
