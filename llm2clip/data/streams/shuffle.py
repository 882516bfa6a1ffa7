# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which samples an epoch takes, and in which order, drawn piece by piece.

Streaming's `resample_streams` and `py1e` draw random numbers for one shard after the other.  Here that is done once
without keeping them, but the generator's state before each shard, and what a piece needs is drawn again from there.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ['Ints', 'Share', 'Shuffle']

Ints = NDArray[np.int64]

# All that changes in the state of a PCG64 generator while it draws.
_STATE = np.dtype([('high', 'u8'), ('low', 'u8'), ('buffered', 'u4'), ('has_buffered', '?')])


class _States:
    """States of a generator, from each of which it draws again what it drew then.

    Args:
        seed: Of the generator.
        n: How many states there will be.
    """

    def __init__(self, seed: int, n: int) -> None:
        self._seed, self._kept = seed, np.zeros(n, _STATE)

    def keep(self, i: int, rng: np.random.Generator) -> None:
        state = rng.bit_generator.state
        number = state['state']['state']
        self._kept[i] = number >> 64, number & (1 << 64) - 1, state['uinteger'], state['has_uint32']

    def generator(self, i: int) -> np.random.Generator:
        rng = np.random.default_rng(self._seed)
        high, low, buffered, has_buffered = self._kept[i].tolist()
        state = rng.bit_generator.state
        state['state']['state'] = high << 64 | low
        rng.bit_generator.state = {**state, 'uinteger': buffered, 'has_uint32': int(has_buffered)}
        return rng


class Share:
    """Which samples an epoch takes of some shards: each a number of whole times, and then a random part.

    Args:
        sizes: Samples of each shard.
        firsts: Number of each shard's first sample in the dataset.
        chosen: How many samples are taken of each shard.
        seed: Of the random parts.
    """

    def __init__(self, sizes: Ints, firsts: Ints, chosen: Ints, seed: int) -> None:
        self._sizes, self._firsts = sizes, firsts
        times, parts = np.divmod(chosen, sizes)
        self._whole, self._ends = times * sizes, chosen.cumsum()
        # What is shuffled as a whole: every time, and the part.
        starts = np.concatenate([[0], (times + (parts > 0)).cumsum()])
        self.units = np.repeat(sizes, np.diff(starts))
        self.units[starts[1:][parts > 0] - 1] = parts[parts > 0]
        self._parts, self._states = parts, _States(seed, len(sizes))
        rng = np.random.default_rng(seed)
        for shard in np.flatnonzero(parts):
            self._states.keep(shard, rng)
            rng.choice(sizes[shard], parts[shard], False)
        self._part = lru_cache(maxsize=4096)(self._draw_part)

    def _draw_part(self, shard: int) -> Ints:
        part = self._states.generator(shard).choice(self._sizes[shard], self._parts[shard], False)
        part.sort()
        return part

    def samples(self, taken: Ints) -> Ints:
        """Numbers of samples in the dataset from their numbers ``(N,)`` among those that are taken."""
        shards = np.searchsorted(self._ends, taken, 'right')
        within = taken - np.where(shards, self._ends[shards - 1], 0)
        in_part = within >= self._whole[shards]
        result = self._firsts[shards] + within % self._sizes[shards]
        for shard in np.unique(shards[in_part]).tolist():
            rows = in_part & (shards == shard)
            result[rows] = self._firsts[shard] + self._part(shard)[within[rows] - self._whole[shard]]
        return result


class Shuffle:
    """Streaming's `py1e`: the order in which the samples of each canonical node come.

    Args:
        units: Sizes of what is shuffled as a whole.
        nodes: Number of canonical nodes.
        seed: Of the run.
        epoch: Which one.
        block_size: About how far the samples of a shard are spread.

    Raises:
        ValueError: There are fewer samples than canonical nodes.
    """

    def __init__(self, units: Ints, nodes: int, seed: int, epoch: int, block_size: int) -> None:
        total = int(units.sum())
        if total < nodes:
            raise ValueError(f'{total} samples cannot be shuffled within {nodes} canonical nodes; reduce '
                             'num_canonical_nodes')
        self._bounds = np.arange(nodes + 1) * total // nodes
        self._seed, self._epoch, self._block = seed, epoch, block_size
        # The units in the order of the run, cut where a canonical node ends.
        order = np.array(_shuffled(np.random.default_rng(seed), range(len(units))))
        ends = units[order].cumsum()
        cuts = np.union1d(ends, self._bounds[1:])
        begins = np.concatenate([[0], cuts[:-1]])
        unit = np.searchsorted(ends, begins, 'right')
        firsts = (units.cumsum() - units)[order[unit]] + begins - (ends - units[order])[unit]
        self._node_ends = np.searchsorted(cuts, self._bounds[1:], 'right')
        rng = np.random.default_rng(seed + epoch)
        spans = np.concatenate([np.array(_shuffled(rng, range(*node)), np.int64) for node in self._spans()])
        self._firsts, self._sizes = firsts[spans], (cuts - begins)[spans]
        self._offsets = self._sizes.cumsum() - self._sizes
        self._draw_all(rng)
        self._nodes: dict[int, _Window] = {}

    def _spans(self) -> Iterator[tuple[int, int]]:
        """First and last, exclusive, of each canonical node."""
        return zip([0, *self._node_ends[:-1].tolist()], self._node_ends.tolist())

    def _draw_all(self, rng: np.random.Generator) -> None:
        """Draw what Streaming draws, and keep the state before each span."""
        seed = self._seed + self._epoch
        self._orders, self._shifts = (_States(seed, len(self._sizes)) for _ in range(2))
        scratch, floats = np.arange(self._sizes.max()), np.empty(self._sizes.max())
        sizes = self._sizes.tolist()
        for begin, end in self._spans():
            for i in range(begin, end):
                self._orders.keep(i, rng)
                rng.shuffle(scratch[:sizes[i]])
            for i in range(begin, end):
                self._shifts.keep(i, rng)
                self._draw_block(rng)
                rng.random(out=floats[:sizes[i]])

    def _draw_block(self, rng: np.random.Generator) -> int:
        return int(rng.integers(int(0.75 * self._block), int(1.25 * self._block)))

    @property
    def reach(self) -> int:
        """The farthest that a sample is moved."""
        return int(1.25 * self._block / 2) + 1

    def units_of(self, node: int) -> tuple[int, int]:
        """Number of a canonical node's first sample, and of those of the next."""
        return int(self._bounds[node]), int(self._bounds[node + 1])

    def draw(self, node: int, begin: int, end: int) -> tuple[NDArray[np.float64], Ints, int]:
        """The samples of a canonical node that stand in some places before they are moved.

        Args:
            node: Which.
            begin: First place.
            end: Place after the last; spans that are cut are drawn as a whole.

        Returns:
            Where each of N samples is moved to and which it is, both ``(N,)``, and how many stand before them.
        """
        first, last = self.units_of(node)
        spans = list(self._spans())[node]
        offsets = self._offsets[slice(*spans)] - first
        a = spans[0] + max(int(np.searchsorted(offsets, begin, 'right')) - 1, 0)
        b = spans[0] + int(np.searchsorted(offsets, end, 'left'))
        positions, samples = [], []
        for i in range(a, b):
            size, offset = int(self._sizes[i]), int(self._offsets[i]) - first
            ids = np.arange(self._firsts[i], self._firsts[i] + size)
            self._orders.generator(i).shuffle(ids)
            rng = self._shifts.generator(i)
            cutoff = max((self._draw_block(rng) - size) / 2, 0)
            low, high = max(-cutoff, -offset), min(cutoff, last - first - offset - size)
            positions.append(np.arange(offset, offset + size) + rng.uniform(low, high, size))
            samples.append(ids)
        before = int(self._offsets[a]) - first if a < spans[1] else last - first
        return np.concatenate(positions or [np.empty(0)]), np.concatenate(samples or [np.empty(0, np.int64)]), before

    def order(self, node: int, begin: int, end: int) -> Ints:
        """Which samples come in some places of a canonical node, ``(end - begin,)``.

        Quick where each call goes on near the end of the last.
        """
        window = self._nodes.get(node)
        if window is None or begin < window.begin:
            window = self._nodes[node] = _Window(self, node, begin)
        return window.take(begin, end)


class _Window:
    """Moves through one canonical node.

    Attributes:
        begin: The first place that it still has.
    """

    def __init__(self, shuffle: Shuffle, node: int, begin: int) -> None:
        self._shuffle, self._node, self.begin = shuffle, node, begin
        # A sample that comes in place i is moved to a position within `reach` of i, from one within `reach` of that.
        self._positions, self._samples, self._settled = shuffle.draw(node, begin - 2 * shuffle.reach, begin)
        self._drawn = self._settled + len(self._samples)
        self._found = np.empty(0, np.int64)

    def take(self, begin: int, end: int) -> Ints:
        if end > self.begin + len(self._found):
            self._found = np.concatenate([self._found, self._go_on(end)])[begin - self.begin:]
            self.begin = begin
        return self._found[begin - self.begin:end - self.begin]

    def _go_on(self, end: int) -> Ints:
        """The samples from the last place found on, until `end`."""
        positions, samples, before = self._shuffle.draw(self._node, self._drawn, end + 2 * self._shuffle.reach)
        new = max(self._drawn - before, 0)
        self._drawn += len(samples[new:])
        positions = np.concatenate([self._positions, positions[new:]])
        samples = np.concatenate([self._samples, samples[new:]])
        order = positions.argsort()
        done, begin = end - self._settled, self.begin + len(self._found) - self._settled
        self._positions, self._samples = positions[order[done:]], samples[order[done:]]
        self._settled = end
        return samples[order[begin:done]]


def _shuffled(rng: np.random.Generator, numbers: range) -> list[int]:
    """In the order that the generator gives any list of that length."""
    result = list(numbers)
    rng.shuffle(result)
    return result
