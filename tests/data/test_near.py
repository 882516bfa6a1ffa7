# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Hashes of images that look alike, and all pairs of them."""

import numpy as np
import pytest
from clouds import cloud, encoded, near_copies
from numpy.typing import NDArray
from PIL import ImageOps

from llm2clip.data.image_hashes import BITS, VIEWS, WORDS, decode_grey, distances, image_hashes, mirrored
from llm2clip.data.near import HashIndex, groups_of


def _grey(*images: bytes) -> NDArray[np.uint8]:
    return np.stack([decode_grey(data, 'x') for data in images])


def test_a_mirrored_image_has_the_mirrored_hash() -> None:
    image = cloud(0)
    grey = _grey(encoded(image, 'PNG'), encoded(ImageOps.mirror(image), 'PNG'))
    assert np.abs(grey[0].astype(int) - grey[1, :, ::-1]).max() <= 1
    plain, other = image_hashes(np.stack([grey[0], grey[0, :, ::-1]]))
    # Of parts, those that lie on the other side.
    across = [VIEWS.index(min(VIEWS, key=lambda view: abs(view[0] - (1 - x - side)) + abs(view[1] - y) +
                              abs(view[2] - side))) for x, y, side in VIEWS]
    assert distances(mirrored(plain), other[across]).max() <= 2
    assert distances(plain, other[across]).min() > BITS / 4
    assert (mirrored(mirrored(plain)) == plain).all()


def test_a_part_has_the_hash_of_the_image_that_shows_it_alone() -> None:
    image = cloud(1, 400)
    hashes, = image_hashes(_grey(encoded(image, 'PNG')))
    for view, (x, y, side) in list(enumerate(VIEWS))[1::5]:
        part = image.crop((round(400 * x), round(400 * y), round(400 * (x + side)), round(400 * (y + side))))
        alone = image_hashes(_grey(encoded(part, 'PNG')))[0, 0]
        assert distances(hashes[view], alone) < BITS / 8 < distances(hashes[0], alone)


def test_copies_are_near_and_others_are_not() -> None:
    originals = [cloud(seed) for seed in range(8)]
    whole = image_hashes(_grey(*(encoded(image, 'PNG') for image in originals)))
    for seed, image in enumerate(originals):
        for kind, data in near_copies(image).items():
            copy, = image_hashes(_grey(data))
            views = np.concatenate([whole, mirrored(whole)], axis=1)
            # A part of the original, or the original itself, is the whole copy.
            found = distances(views, copy[0]).min(axis=1)
            assert found.argmin() == seed and found[seed] <= 56, kind
            assert np.delete(found, seed).min() > 64, kind


@pytest.mark.parametrize(('n', 'radius', 'max_distance'), [(2, 12, 30), (300, 14, BITS), (500, 10, 60), (3000, 3, 40)])
def test_all_pairs_are_found_as_by_comparing_every_hash_with_every_other(
    n: int, radius: int, max_distance: int
) -> None:
    rng = np.random.default_rng(n)
    hashes = rng.integers(0, 2**64, (n, WORDS), dtype=np.uint64)
    queries = hashes[rng.integers(0, n, 200)]
    for query in queries:
        for bit in rng.choice(BITS, rng.integers(0, 50), replace=False):
            query[bit // 64] ^= np.uint64(1 << int(bit % 64))
    of, found, bits = HashIndex(hashes, max_distance, radius).near(queries)
    differing = np.bitwise_count(queries[:, None] ^ hashes).astype(int)
    expected = np.argwhere((differing[..., 0] <= radius) & (differing.sum(-1) <= max_distance))
    assert len(expected) >= 50 and np.array_equal(np.stack([of, found], axis=1), expected)
    assert np.array_equal(bits, differing.sum(-1)[of, found])
    nothing = HashIndex(hashes, max_distance, radius).near(queries[:0])
    assert [len(column) for column in nothing] == [0, 0, 0]


def test_what_is_joined_by_others_is_one_group() -> None:
    label = groups_of(np.array([[0, 4], [4, 2], [5, 3]]), 6)
    assert len({*label[[0, 4, 2]]}) == len({*label[[5, 3]]}) == 1 and len({*label}) == 3
    assert len({*groups_of(np.empty((0, 2), np.int64), 3)}) == 3
