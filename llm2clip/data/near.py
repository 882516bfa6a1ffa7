# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Pairs of hashes that differ in few bits, all of them, without comparing every hash with every other; and groups.

Multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012, arXiv 1307.2982): of two words of 64 bits, cut into m bands,
that differ in at most r bits, one of the bands differs in at most r // m bits.  So the words are sorted by each band,
and a query meets those alone that have its band, or the same with few bits flipped.  Fewer and wider bands are met by
fewer words, and need more bits flipped.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from llm2clip.data.image_hashes import distances

__all__ = ['HashIndex', 'NearPairs', 'groups_of']

_WORD = 64
# Of first words, whose low frequencies hardly differ between near-copies.
RADIUS = 8
# Candidates that are compared at once: some hundred megabytes.
_CANDIDATES = 1 << 22


class NearPairs(NamedTuple):
    """K pairs of a query and an indexed hash."""

    queries: NDArray[np.int64]
    """``(K,)`` positions."""
    found: NDArray[np.int64]
    """``(K,)`` positions."""
    distances: NDArray[np.int64]
    """``(K,)`` bits."""


class _Band(NamedTuple):
    """A piece of the first word of all hashes, and the hashes in its order."""

    shift: int
    bits: int
    starts: NDArray[np.int64]
    """Value of the band -> where its hashes begin in `order`."""
    order: NDArray[np.int32]
    """Positions of hashes, by the value of the band."""
    words: NDArray[np.uint64]
    """Their first words, in that order."""
    flips: NDArray[np.int64]
    """What a query's band is changed by."""


class HashIndex:
    """Hashes of which those near to others are found.

    Memory is 8 bytes per hash and word, and 12 per hash and band, of which there are 3 to 5 for millions of hashes.

    Args:
        hashes: ``(N, W)``; the first word is the one that is searched for.
        max_distance: In how many bits the hashes of a pair may differ.
        radius: In how many bits their first words may differ.
    """

    def __init__(self, hashes: NDArray[np.uint64], max_distance: int, radius: int = RADIUS) -> None:
        self.hashes, self.radius, self.max_distance = hashes, radius, max_distance
        layouts = [_layout(n, radius) for n in range(3, 9)]
        cheapest = min(layouts, key=lambda bands: sum(_cost(len(hashes), *band[1:]) for band in bands))
        self._bands = [self._band(*band) for band in cheapest]

    def _band(self, shift: int, bits: int, flipped: int) -> _Band:
        keys = _keys(self.hashes[:, 0], shift, bits)
        order = np.argsort(keys, kind='stable').astype(np.int32)
        starts = np.searchsorted(keys[order], np.arange((1 << bits) + 1))
        flips = [sum(1 << bit for bit in chosen) for n in range(flipped + 1)
                 for chosen in itertools.combinations(range(bits), n)]
        return _Band(shift, bits, starts, order, self.hashes[order, 0], np.array(flips, np.int64))

    def near(self, queries: NDArray[np.uint64]) -> NearPairs:
        """All pairs, each once, in the order of the queries.

        Args:
            queries: ``(Q, W)``
        """
        parts = [self._verified(queries, *candidates) for band in self._bands
                 for candidates in self._candidates(band, queries[:, 0])]
        pairs = np.concatenate([np.empty((0, 2), np.int64), *parts])
        pairs = np.unique(pairs, axis=0)
        return NearPairs(pairs[:, 0], pairs[:, 1], distances(queries[pairs[:, 0]], self.hashes[pairs[:, 1]]))

    def _candidates(
        self, band: _Band, words: NDArray[np.uint64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Queries, and places in the band's order, of words near enough in one band to be compared."""
        keys = _keys(words, band.shift, band.bits)
        for flip in band.flips:
            begin = band.starts[keys ^ flip]
            counts = band.starts[(keys ^ flip) + 1] - begin
            ends = np.cumsum(counts)
            first = 0
            while first < len(words):
                done = ends[first - 1] if first else 0
                last = max(first + 1, int(np.searchsorted(ends, done + _CANDIDATES, side='right')))
                of = np.repeat(np.arange(first, last), counts[first:last])
                place = np.arange(len(of)) + (begin - (ends - counts) + done)[of]
                near = np.bitwise_count(band.words[place] ^ words[of]) <= self.radius
                yield of[near], band.order[place[near]].astype(np.int64)
                first = last

    def _verified(
        self, queries: NDArray[np.uint64], of: NDArray[np.int64], found: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """``(K, 2)``: those that are near in all words."""
        near = distances(queries[of], self.hashes[found]) <= self.max_distance
        return np.stack([of[near], found[near]], axis=1)


def _layout(n: int, radius: int) -> list[tuple[int, int, int]]:
    """The lowest bit and the number of bits of each of n bands, and how many bits of it are flipped."""
    edges = np.linspace(0, _WORD, n + 1).astype(int).tolist()
    # If r = n * q + a, one of the first a + 1 bands differs in at most q bits, or one of the others in less.
    few, more = divmod(radius, n)
    return [(low, high - low, few if i <= more else few - 1) for i, (low, high) in enumerate(itertools.pairwise(edges))
            if i <= more or few]


def _cost(n: int, bits: int, flipped: int) -> float:
    """About how many of n hashes a query is compared with in a band, where looking one up costs as much as five."""
    return sum(math.comb(bits, k) for k in range(flipped + 1)) * (5 + n / 2 ** bits)


def _keys(words: NDArray[np.uint64], shift: int, bits: int) -> NDArray[np.int64]:
    """A band's value of each word."""
    return (words >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.int64)


def groups_of(pairs: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """``(n,)``: the number of each thing's group, where ``(K, 2)`` pairs belong together, and whatever is joined by
    others."""
    joined = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(joined, directed=False)[1].astype(np.int64)
