# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Encoded images -> upright RGB, whatever their format and colour mode, and what training does to their pixels."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from llm2clip.data.image_processing_llm2clip import orientation, upright_rgb

__all__ = [
    'Preprocessing', 'crop_image', 'decode_image', 'decode_pixels', 'encode_image', 'open_image',
    'pixels_needed', 'seeded', 'train_transform', 'unsupported_format',
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
        data: As for `decode_image`.
        sample_id: For messages.
        at_least: If the shortest side is at least twice that, a JPEG comes back at 1/2, 1/4 or 1/8 of its size, not
            smaller than that, which libjpeg does in the DCT domain.  Leave out for the full size.
    """
    def decode(image: Image.Image) -> Any:
        if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
            if at_least and min(image.size) >= 2 * at_least:
                scale = at_least / min(image.size)
                image.draft('RGB', (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            elif orientation(image) == 1:
                # The same pixels as Pillow's, bit by bit, in up to a fifth less time.
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
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


def unsupported_format(data: bytes) -> Optional[str]:
    """What a file that cannot be decoded is, if it is no image or one of an unsupported format, as its start tells."""
    head = data[:4096]
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(head)), None)


# ---------------------------------------------------------------------------------------------------------------------
# What training does to pixels, (3, H, W) -> (3, image_size, image_size), both uint8
# ---------------------------------------------------------------------------------------------------------------------
# On tensors: torchvision resizes them several times faster than Pillow does, to the same values up to 2 of 255.


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
