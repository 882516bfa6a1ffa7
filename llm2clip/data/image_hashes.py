# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Perceptual hashes: images that look alike have hashes that differ in few bits.

A bit is the sign of one coefficient of the discrete cosine transform of the grey image, for the lowest frequencies
without the mean, as in pHash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section
3.2.1), which compares with their median in place of 0.  With 0, an image and its mirror image differ in known bits, and
since the transform is a product of matrices, any part of an image is hashed without being cut out.  Libraries that hash
one image at a time, such as imagehash, offer neither.
"""

import json
from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from llm2clip.data.images import decode_pixels

__all__ = ['BITS', 'KIND', 'VIEWS', 'WORDS', 'decode_grey', 'distances', 'image_hashes', 'mirrored']

WORDS = 4
"""A hash is so many words of 64 bits; the first has the lowest frequencies."""
BITS = 64 * WORDS
_SIDE = 64
_HIGHEST = 24
# Those nearest to 0, (vertical, horizontal).
_FREQUENCIES = sorted(((v, u) for v in range(_HIGHEST) for u in range(_HIGHEST) if u + v),
                      key=lambda f: (f[0] ** 2 + f[1] ** 2, f))[:BITS]


def _windows() -> Iterator[tuple[float, float, float]]:
    """Left, upper and side of the parts of an image that are hashed, as shares of its width and height."""
    yield 0.0, 0.0, 1.0
    for side, steps in ((0.93, 3), (0.87, 4), (0.81, 5)):
        for y in np.linspace(0, 1 - side, steps):
            for x in np.linspace(0, 1 - side, steps):
                yield float(x), float(y), side


VIEWS = [*_windows()]
"""The whole image, and parts of it that near-copies may show: left and upper border and side, as shares."""


def _cosines(begin: float, side: float) -> NDArray[np.float32]:
    """``(frequencies, _SIDE)``: cosines over a part of an axis, times the share of each pixel that is in that part.

    All but the first are made to see nothing in a constant, also where the part begins within a pixel.
    """
    edges = np.arange(_SIDE + 1) / _SIDE
    low, high = np.maximum(edges[:-1], begin), np.minimum(edges[1:], begin + side)
    inside = np.clip(high - low, 0, None) * _SIDE
    at = ((low + high) / 2 - begin) / side
    waves = np.cos(np.pi * np.arange(_HIGHEST)[:, None] * at) * inside
    waves[1:] -= waves[1:].sum(1, keepdims=True) * inside / inside.sum()
    return waves.astype(np.float32)


_ACROSS = np.stack([_cosines(x, side) for x, _, side in VIEWS])
_DOWN = np.stack([_cosines(y, side) for _, y, side in VIEWS])
KIND = f'hashes-{xxhash.xxh32(json.dumps([VIEWS, _FREQUENCIES])).hexdigest()}'
"""Of hashes that can be compared."""
_ROWS, _COLUMNS = np.array(_FREQUENCIES).T
_MIRROR = np.packbits(_COLUMNS % 2 == 1, bitorder='little').view('<u8')


def decode_grey(data: bytes, sample_id: str) -> NDArray[np.uint8]:
    """An image as ``(64, 64)`` grey values, whatever its format and proportions.

    Raises:
        ValueError: It cannot be decoded; names the sample.
    """
    pixels = decode_pixels(data, sample_id, at_least=_SIDE).permute(1, 2, 0).numpy()
    # Pillow's box filter takes other pixels of an image than of the same one in a mirror.
    return np.asarray(Image.fromarray(pixels).convert('L').resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def image_hashes(grey: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Hashes of images and of parts of them.

    Args:
        grey: ``(N, 64, 64)``, as `decode_grey` gives them.

    Returns:
        ``(N, V, WORDS)``, for each of the V `VIEWS`.
    """
    values = grey.astype(np.float32)[:, None]
    coefficients = _DOWN @ (values @ _ACROSS.transpose(0, 2, 1))
    bits = np.packbits(coefficients[:, :, _ROWS, _COLUMNS] > 0, axis=-1, bitorder='little')
    return np.ascontiguousarray(bits).view('<u8').astype(np.uint64)


def mirrored(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes ``(…, WORDS)`` of images -> those of the same images as in a mirror."""
    return hashes ^ _MIRROR


def distances(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """In how many bits hashes ``(…, WORDS)`` differ."""
    return np.bitwise_count(a ^ b).sum(-1, dtype=np.int64)
