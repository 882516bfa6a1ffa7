# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image preprocessing of the vision tower, for training, evaluation, search and exported models alike.

Exports with remote code contain a copy of this file.  It therefore imports no other module of this package,
and only torch, transformers, Pillow and numpy besides the standard library.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

# Pillow reads more formats, but EPS starts another program, and rarely used decoders are a security risk.
# 'JPEG' includes JPEGs with several pictures (MPO), which phones write.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF', 'PPM')
# Larger images are refused before they are decoded: a few kilobytes can expand to gigabytes.
MAX_PIXELS = 100_000_000
# Limit for a JPEG: the shortest Huffman code has one bit, and every block of 64 pixels has at least one code.
_MAX_PIXELS_PER_BYTE = 512

# Longer images are cropped to this aspect ratio before resizing.  The centre crop would remove their ends in
# any case, but resizing would turn 10,000 x 1 pixels into 2,240,000 x 224.
_LONGEST_ASPECT = 16
# Seconds to wait for an image on the web.
_TIMEOUT = 60


class TooManyPixels(ValueError):
    """An image has more than `MAX_PIXELS` pixels."""


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image with Pillow, which decodes the pixels later.

    Raises:
        ValueError: The format of the image is not one of `FORMATS`.
        TooManyPixels: It has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f'expected {", ".join(FORMATS)}') from None
    n_pixels = image.width * image.height
    if n_pixels > MAX_PIXELS:
        raise TooManyPixels(f'{image.width} x {image.height} are more than {MAX_PIXELS:,} pixels')
    if image.format == 'JPEG' and n_pixels > _MAX_PIXELS_PER_BYTE * len(data):
        raise ValueError(f'{len(data):,} bytes are too few for {image.width} x {image.height} pixels')
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright RGB: apply the orientation, put transparency on white, scale 16-bit greys to 8 bits.

    Raises:
        ValueError: The pixels are floating-point or do not fit into 16 bits,
            so the value of white is unknown.
    """
    image.load()  # Pillow rotates a TIFF when it loads it
    turns = Image.Transpose
    transpositions: dict[Any, Image.Transpose] = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90}
    try:
        turn = transpositions.get(image.getexif().get(0x0112))  # Pillow reads it from EXIF, or else XMP
    except Exception:  # damaged EXIF does not make the pixels unreadable
        turn = None
    if turn is not None:
        image = image.transpose(turn)
        # Without EXIF, no caller rotates it again.  ImageOps.exif_transpose would fail on odd tags.
        image.info = {name: value for name, value in image.info.items() if name == 'transparency'}
    if image.mode == 'F':
        raise ValueError('its pixels are fractions, expected whole numbers of 8 or 16 bits')
    if image.mode in ('I', 'I;16', 'I;16B', 'I;16L'):  # Pillow would clip at 255
        values = np.asarray(image)
        if image.mode == 'I' and not 0 <= values.min() <= values.max() < 1 << 16:
            raise ValueError(f'its pixels are from {values.min()} to {values.max()}, expected 8 or 16 bits')
        grey = (values.astype(np.uint16) >> 8).astype(np.uint8)
        if 'transparency' in image.info:  # one of the 65,536 greys
            grey[values == image.info['transparency']] = 255
        return Image.fromarray(grey).convert('RGB')
    if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    if image.mode == 'RGB':  # convert would copy
        return image
    return image.convert('RGB')


def resize_and_crop(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the shortest side to `size`, bicubic, and crop the centre of ``(3, H, W)`` uint8 to a square.

    The crop starts at the same pixel as in transformers; torchvision's starts a pixel later in a quarter of
    images.
    """
    longest = _LONGEST_ASPECT * min(pixels.shape[-2:])
    pixels = _center(pixels, longest, longest)
    height, width = pixels.shape[-2:]
    sides = [int(size * side / min(height, width)) for side in (height, width)]
    resized = F.interpolate(pixels[None], sides, mode='bicubic', antialias=True)[0]
    return _center(resized, size, size)


def _center(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Centre crop of at most `height` x `width` pixels."""
    top = max(0, (pixels.shape[-2] - height) // 2)
    left = max(0, (pixels.shape[-1] - width) // 2)
    return pixels[..., top:top + height, left:left + width]


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scale ``(…, 3, H, W)`` uint8 to [0, 1] and normalise it by channel, in float32 on the same device."""
    center = _channels(mean, pixels.device)
    scale = _channels(std, pixels.device)
    # torchvision multiplies by 1 / 255 too, and so does torch on a GPU for a division by 255.
    return (pixels.float() * (1 / 255)).sub_(center).div_(scale)


def _channels(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Values of the channels, ``(3, 1, 1)``, created on the device, since the host would wait for a copy."""
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


class LLM2CLIPImageProcessor(BaseImageProcessor):
    """Image processor with the same preprocessing as evaluation during training.

    Args:
        image_size: Side of the square input of the vision tower, in pixels.
        image_mean: Mean of each channel, for RGB in [0, 1].
        image_std: Standard deviation of each channel.
        **kwargs: Passed to BaseImageProcessor.
    """

    model_input_names = ['pixel_values']

    def __init__(
        self, image_size: int = 224, image_mean: Sequence[float] = (0.5,) * 3,
        image_std: Sequence[float] = (0.5,) * 3, **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any, return_tensors: Optional[str] = None
    ) -> BatchFeature:
        """Return ``pixel_values`` ``(B, 3, image_size, image_size)`` in float32.

        Args:
            images: Image or list of images, of any size: Pillow images of any mode, their paths or URLs, or
                RGB values in uint8, ``(H, W, 3)`` or ``(3, H, W)``.
            return_tensors: As for every image processor; by default a torch tensor.

        Raises:
            ValueError: An input is not an image or cannot be read, or is an array of another type or shape.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        pictures = self.fetch_images(images)
        pixels = torch.stack([resize_and_crop(_pixels(picture), self.image_size) for picture in pictures])
        values = normalize(pixels, self.image_mean, self.image_std)
        return BatchFeature({'pixel_values': values}, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths, http(s) URLs and data URIs among images; transformers would drop their transparency.
        A ValueError names one that is not a readable image."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(picture) for picture in image_url_or_urls]
        if not isinstance(image_url_or_urls, str):
            return image_url_or_urls
        name = image_url_or_urls
        try:
            if name.startswith(('http://', 'https://', 'data:')):
                with urlopen(name, timeout=_TIMEOUT) as response:
                    data = response.read()
            else:
                data = Path(name).read_bytes()
            image = open_image(data)
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f'{name[:200]}: expected a readable image ({error})') from error
        return image

    def to_dict(self) -> dict[str, Any]:
        """Return the settings without the class name, which transformers finds in the model's configuration.
        With it, transformers would look for a faster processor and warn that there is none."""
        return {name: value for name, value in super().to_dict().items() if name != 'image_processor_type'}


def _pixels(picture: Any) -> torch.Tensor:
    """Pixels of an image, ``(3, H, W)`` in uint8."""
    if isinstance(picture, Image.Image):
        picture = upright_rgb(picture)
    values = np.array(picture)  # a copy, since torch needs a writable array
    if values.dtype != np.uint8 or values.ndim != 3 or 3 not in (values.shape[0], values.shape[2]):
        raise ValueError('expected pictures as PIL.Image.open gives them, or RGB values in uint8; got a '
                         f'{type(picture).__name__} with {values.dtype} values of shape {values.shape}')
    pixels = torch.from_numpy(values)
    return pixels.permute(2, 0, 1) if values.shape[2] == 3 else pixels
