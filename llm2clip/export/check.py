# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checks that compare an exported model with the trained one."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from llm2clip.data.images import Preprocessing, decode_pixels, encode_image
from llm2clip.errors import ConfigError
from llm2clip.modeling.image_processing_llm2clip import normalize, open_image, resize_and_crop

_TOLERANCE = 1e-5  # relative to the largest value
# Mean over the pixels, from 0 to 255.  Pictures that are not made upright RGB on white differ by 10 or more.
_PIXEL_TOLERANCE = 1.0
_Features = Callable[[torch.Tensor], torch.Tensor]


def noise(*shape: int) -> torch.Tensor:
    """Return standard normal noise, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def pictures(image_size: int, cropped: int = 7) -> dict[str, bytes]:
    """Return encoded pictures that are easily decoded differently than in training,
    with names for messages as keys.

    Their shortest side is twice `image_size`; the centre crop removes `cropped` rows or columns.  If that is
    3, 7, 11, …, transformers removes the odd one at the end, torchvision at the beginning.
    """
    width, height = 2 * (image_size + cropped), 2 * image_size
    y, x = np.mgrid[0:height, 0:width] / height
    colors = np.stack([255 * x / x.max(), 255 * y, 127 + 120 * np.sin(9 * x + 4 * y)], -1).astype(np.uint8)
    photo = Image.fromarray(colors)
    transparent = photo.copy()
    transparent.putalpha(Image.fromarray((255 * (x > y)).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        'a transparent picture': encode_image(transparent, 'PNG'),
        'a picture turned by EXIF': encode_image(photo, 'JPEG', exif=exif),
        'a palette with transparency': encode_image(photo.quantize(16), 'PNG', transparency=3),
        'a 16-bit grey picture': encode_image(Image.fromarray((65535 * y).astype(np.uint16)), 'PNG'),
        'a CMYK picture': encode_image(photo.convert('CMYK'), 'JPEG'),
    }


def training_pixels(data: bytes, name: str = 'check', *, preprocessing: Preprocessing) -> torch.Tensor:
    """Return the pixels ``(3, H, W)`` that evaluation in training makes of an encoded picture."""
    pixels = resize_and_crop(decode_pixels(data, name), preprocessing.image_size)
    return normalize(pixels, preprocessing.mean, preprocessing.std)


@torch.no_grad()
def check_pictures(
    exported: Callable[[Image.Image], torch.Tensor], expected: _Features, preprocessing: Preprocessing,
    subject: str,
) -> None:
    """Call `check_same` for each of the `pictures`, with `subject` as the name of the exported model.

    `exported` maps a picture from `PIL.Image.open` to features ``(1, D)`` of the exported model, `expected`
    maps pixels ``(1, 3, H, W)`` to those of the checkpoint.
    """
    for name, data in pictures(preprocessing.image_size).items():
        pixels = training_pixels(data, preprocessing=preprocessing)[None]
        check_same(lambda _, data=data: exported(open_image(data)), expected, pixels, f'{subject}, {name}')


def check_pixels(
    transform: Callable[[Image.Image], torch.Tensor], preprocessing: Preprocessing, subject: str
) -> None:
    """Raise a ConfigError unless an image transform gives nearly the pixels ``(3, H, W)`` of training.

    The centre crop removes an even number of rows or columns, which all libraries split equally between both
    ends.
    """
    std = torch.tensor(preprocessing.std)[:, None, None]
    for name, data in pictures(preprocessing.image_size, cropped=6).items():
        difference = (transform(open_image(data)) - training_pixels(data, preprocessing=preprocessing)) * std
        mean = 255 * difference.abs().mean().item()
        if not mean <= _PIXEL_TOLERANCE:
            raise ConfigError(f'{subject} of {name} differs from that of training by {mean:.1f} of 255 in '
                              'the mean')


@torch.no_grad()
def check_same(exported: _Features, expected: _Features, inputs: torch.Tensor, subject: str) -> None:
    """Raise a ConfigError unless both functions give the same features, up to float32's rounding."""
    want = expected(inputs)
    got = exported(inputs)
    difference = float('inf')
    if got.shape == want.shape:
        difference = ((got - want).abs().max() / want.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise ConfigError(f'{subject}: the features differ from those of the checkpoint, by {difference:.1e} '
                          f'of the largest (shapes {tuple(got.shape)} and {tuple(want.shape)})')
