# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures with detail of all sizes, as photographs have it, and near-copies of them."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from llm2clip.data.images import encode_image


def cloud(seed: int, size: int = 160) -> Image.Image:
    """Coloured noise whose strength falls with its frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1
    waves = rng.standard_normal((3, size, size // 2 + 1)) + 1j * rng.standard_normal((3, size, size // 2 + 1))
    pixels = np.fft.irfft2(waves / frequency ** 1.2, s=(size, size))
    pixels = 128 + 50 * (pixels - pixels.mean((1, 2), keepdims=True)) / pixels.std((1, 2), keepdims=True)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image, kind: str = 'JPEG', quality: int = 95) -> bytes:
    return encode_image(image, kind, **({'quality': quality} if kind == 'JPEG' else {}))


def near_copies(image: Image.Image) -> dict[str, bytes]:
    """One of each kind."""
    w, h = image.size
    colours = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.15)).enhance(0.8)
    return {'crop': encoded(image.crop((w // 20, h // 10, w // 20 + int(0.86 * w), h // 10 + int(0.86 * h)))),
            'jpeg': encoded(image, quality=30), 'resize': encoded(image.resize((w // 2, int(0.55 * h)))),
            'mirror': encoded(ImageOps.mirror(image)), 'colour': encoded(colours),
            'mirrored crop': encoded(ImageOps.mirror(image.crop((0, 0, int(0.92 * w), int(0.92 * h)))))}
