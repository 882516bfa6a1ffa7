# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which rank and worker reads which place of an epoch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llm2clip.data.streams.shuffle import Ints

__all__ = ['Partition', 'Readers']


@dataclass(frozen=True)
class Readers:
    """Who reads a dataset: nodes, ranks of each, workers of each rank, and samples per batch of a rank."""

    nodes: int
    ranks: int
    workers: int
    batch: int

    @property
    def global_batch(self) -> int:
        return self.nodes * self.ranks * self.batch


@dataclass(frozen=True)
class Partition:
    """Streaming's `get_partitions` as arithmetic.

    The places of an epoch are counted in the order in which they are read: a batch of the first worker of every rank of
    every node, then one of the second, and so on.

    Attributes:
        samples: Of the epoch.
        nodes: Number of canonical nodes.
        world: Who reads.
        seen: Samples that have been read before.
    """

    samples: int
    nodes: int
    world: Readers
    seen: int = 0

    @property
    def possible(self) -> bool:
        """Whether there is a sample for each canonical node; where not, Streaming repeats many."""
        return self.samples > self.nodes or self.samples == self.nodes >= self.world.nodes

    @cached_property
    def _row(self) -> tuple[int, int, int]:
        """Samples of the longest canonical node, nodes that share one, and how many places are added to a row."""
        longest = -(-self.samples // self.nodes)
        ratio = max(self.world.nodes // self.nodes, 1)
        return longest, ratio, -longest % ratio

    @cached_property
    def _dropped(self) -> int:
        return self.seen - self.seen % self.world.nodes

    @cached_property
    def _of_node(self) -> int:
        """Places of a node."""
        longest, _, padding = self._row
        return max(self.nodes * (longest + padding) - self._dropped, 0) // self.world.nodes

    @cached_property
    def _of_rank(self) -> int:
        """Places of a rank that have a sample."""
        return -(-self._of_node // self.world.ranks)

    @property
    def size(self) -> int:
        """Number of all places, also of those without a sample, which fill the workers' last batches."""
        each = self.world.workers * self.world.batch
        return -(-self._of_rank // each) * each * self.world.ranks * self.world.nodes

    @property
    def full_batches(self) -> int:
        """Global batches without an empty place."""
        return self._of_rank // self.world.batch

    def places(self, read: Ints) -> tuple[Ints, Ints]:
        """Canonical node and place in it of what is read ``(N,)``; the node is -1 where there is no sample."""
        world = self.world
        rest, sample = np.divmod(read, world.batch)
        rest, rank = np.divmod(rest, world.ranks)
        rest, node = np.divmod(rest, world.nodes)
        in_rank = rest * world.batch + sample
        in_node = in_rank * world.ranks + rank
        # The last ranks repeat samples where they have one less than the others.
        short, of_node = -self._of_node % world.ranks, max(self._of_node, 1)
        repeated = in_node - (world.ranks + short - 1) if world.ranks + short - 1 <= of_node else in_node % of_node
        in_node = np.where(in_node >= of_node, repeated, in_node)
        place, row = np.divmod(in_node * world.nodes + node + self._dropped, self.nodes)
        longest, ratio, padding = self._row
        place -= np.where(place >= longest, ratio - 1 + padding, 0)
        lengths = np.diff(np.arange(self.nodes + 1) * self.samples // self.nodes)
        place -= (place == longest - 1) & (lengths[row] < longest)
        return np.where(in_rank < self._of_rank, row, -1), place
