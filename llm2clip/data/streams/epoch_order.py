# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The order of an epoch, piece by piece: the same as Streaming's, which holds all of it in memory at once.

Streaming makes the order in three steps: which samples of each shard an epoch takes (`resample_streams`), in which
order they come within each canonical node (`py1e`, which moves a sample by up to 5/8 of `shuffle_block_size`), and
which rank and worker gets which place (`get_partitions`).  The first two are in `shuffle`, the third, which is
arithmetic, is in `partition`.

So an epoch of a billion samples in 200,000 shards takes 0.8 GB, where Streaming takes 4.8 GB for a tenth of that.  A
stream of which an epoch takes no whole multiple, such as 1.5 times its samples, still takes 13 bytes for each of its
samples while that is drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.world import World

from llm2clip.data.streams.partition import Partition, Readers
from llm2clip.data.streams.shuffle import Ints, Share, Shuffle

__all__ = ['EpochOrder', 'epoch_order']


class _Mix:
    """Samples that are partitioned and shuffled together.

    Args:
        partition: Who reads which place.
        share: Which samples an epoch takes.
        shuffle: Makes their order, from the sizes of their units; None, the stored one.
    """

    def __init__(
        self, partition: Partition, share: Callable[[], Share], shuffle: Optional[Callable[[Ints], Shuffle]]
    ) -> None:
        self.partition = partition
        self._make_share, self._make_shuffle = share, shuffle

    @cached_property
    def _share(self) -> Share:
        return self._make_share()

    @cached_property
    def _shuffle(self) -> Optional[Shuffle]:
        return None if self._make_shuffle is None else self._make_shuffle(self._share.units)

    def samples(self, read: Ints) -> Ints:
        """Which samples are read, -1 where there is none; both ``(N,)``."""
        nodes, places = self.partition.places(read)
        result = np.full(len(read), -1)
        by_node = nodes.argsort(kind='stable')
        numbers, starts = np.unique(nodes[by_node], return_index=True)
        for node, rows in zip(numbers.tolist(), np.split(by_node, starts[1:])):
            if node >= 0:
                begin, end = int(places[rows].min()), int(places[rows].max()) + 1
                if self._shuffle is None:
                    result[rows] = node * self.partition.samples // self.partition.nodes + places[rows]
                else:
                    result[rows] = self._shuffle.order(node, begin, end)[places[rows] - begin]
        there = result >= 0
        result[there] = self._share.samples(result[there])
        return result


class EpochOrder:
    """Which samples each worker reads in an epoch.

    Args:
        mixes: What is partitioned and shuffled together: all streams, or each.
        readers: Who reads.
        origins: For each global batch, the mix that it comes from; None, all from the only one.
        seen: Global batches that have been read before, if `origins` are given.
    """

    def __init__(self, mixes: Sequence[_Mix], readers: Readers, origins: Optional[Ints] = None, seen: int = 0) -> None:
        self._mixes, self.readers, self._origins, self._seen = mixes, readers, origins, seen
        if origins is None:
            self._size = mixes[0].partition.size
        else:
            self._batches = np.empty(len(origins), np.int64)
            for i in range(len(mixes)):
                self._batches[origins == i] = np.arange(np.count_nonzero(origins == i))
            left = max(len(origins) - seen, 0)
            self._size = -(-left // readers.workers) * readers.workers * readers.global_batch

    @property
    def batches(self) -> int:
        """Of each worker, also those that are not full."""
        return self._size // (self.readers.global_batch * self.readers.workers)

    def piece(self, node: int, first: int, last: int) -> Ints:
        """Samples of a node in a range of its workers' batches, ``(ranks, workers, last - first, batch)``, -1 where
        there is none.  Quick where each call goes on near the end of the last."""
        readers = self.readers
        shape = readers.ranks, readers.workers, min(last, self.batches) - first, readers.batch
        rank, worker, batch, sample = np.ogrid[tuple(map(slice, shape))]
        read = self._read(node, rank, worker, batch + first, sample)
        return self._samples(read.ravel()).reshape(shape)

    def count(self, node: int, rank: int, worker: int) -> int:
        """How many samples a worker reads."""
        full = self._mixes[0].partition.full_batches if self._origins is None else len(self._origins) - self._seen
        # Of the worker's batches these are full.
        first = max(-(-(full - worker) // self.readers.workers), 0)
        rest = self._read(node, rank, worker, *np.ogrid[first:self.batches, :self.readers.batch])
        return first * self.readers.batch + int(np.count_nonzero(~self._is_empty(rest.ravel())))

    def _read(self, node: int, rank: Any, worker: Any, batch: Any, sample: Any) -> Any:
        """When a worker's samples are read, counting all of them."""
        readers = self.readers
        return (((batch * readers.workers + worker) * readers.nodes + node) * readers.ranks + rank) * readers.batch + \
            sample

    def _is_empty(self, read: Ints) -> NDArray[np.bool_]:
        if self._origins is None:
            return self._mixes[0].partition.places(read)[0] < 0
        return read // self.readers.global_batch + self._seen >= len(self._origins)

    def _samples(self, read: Ints) -> Ints:
        if self._origins is None:
            return self._mixes[0].samples(read)
        batch, place = np.divmod(read, self.readers.global_batch)
        batch += self._seen
        result = np.full(len(read), -1)
        there = np.flatnonzero(batch < len(self._origins))
        of = self._origins[batch[there]]
        for i, mix in enumerate(self._mixes):
            rows = there[of == i]
            if len(rows):
                result[rows] = mix.samples(self._batches[batch[rows]] * self.readers.global_batch + place[rows])
        return result


def epoch_order(dataset: StreamingDataset, world: World, epoch: int, seen: int) -> Optional[EpochOrder]:
    """The order of an epoch of a dataset, whose batches are drawn from all streams or each from one.

    Args:
        dataset: What is read.
        world: Who reads.
        epoch: Which one.
        seen: Samples of it that have been read before.

    Returns:
        The order, or None if samples have to be repeated since there are fewer than canonical nodes.

    Raises:
        ValueError: The canonical nodes and the nodes do not divide one another, or a stream does not fill a batch.
    """
    nodes, batch, block = dataset.num_canonical_nodes, dataset.batch_size, dataset.shuffle_block_size
    assert isinstance(nodes, int) and isinstance(batch, int) and isinstance(block, int)
    readers = Readers(world.num_nodes, world.ranks_per_node, world.workers_per_rank, batch)
    first = _first_readers(readers, nodes, dataset.initial_physical_nodes)
    several = dataset.batching_method == 'per_stream'
    groups = [[stream] for stream in range(dataset.num_streams)] if several else [[*range(dataset.num_streams)]]
    mixes = []
    for streams in groups:
        size = sum(int(dataset.streams[stream].choose) for stream in streams)
        part = float(dataset.streams[streams[0]].proportion) if several else 1
        mixes.append(_Mix(
            Partition(size, nodes, first, 0 if several else seen), partial(_share, dataset, streams, epoch),
            partial(Shuffle, nodes=nodes, seed=dataset.shuffle_seed, epoch=epoch,
                    block_size=int(block * part)) if dataset.shuffle else None))
    if not all(mix.partition.possible for mix in mixes):
        return None
    if not several:
        return EpochOrder(mixes, readers)
    batches = [mix.partition.full_batches for mix in mixes]
    if not all(batches):
        raise ValueError(f'stream {batches.index(0)} does not fill a global batch of {readers.global_batch} samples')
    origins = np.repeat(np.arange(len(mixes)), batches)
    np.random.default_rng(dataset.shuffle_seed + epoch * dataset.epoch_seed_change).shuffle(origins)
    return EpochOrder(mixes, readers, origins, seen // readers.global_batch)


def _first_readers(readers: Readers, nodes: int, initial: Optional[int]) -> Readers:
    """Those of the first run, if what they read cannot be divided among the nodes of this one."""
    if max(nodes, readers.nodes) % min(nodes, readers.nodes) == 0:
        return readers
    if initial is None or readers.global_batch % (initial * readers.ranks):
        raise ValueError(f'num_canonical_nodes is {nodes}, expected a multiple or a divisor of the number of nodes, '
                         f'{readers.nodes}')
    return replace(readers, nodes=initial, batch=readers.global_batch // (initial * readers.ranks))


def _share(dataset: StreamingDataset, streams: Sequence[int], epoch: int) -> Share:
    """What an epoch takes of some streams."""
    sizes, firsts, chosen = [], [], []
    for stream in streams:
        shards = slice(begin := dataset.shard_offset_per_stream[stream], begin + dataset.shards_per_stream[stream])
        sizes.append(dataset.samples_per_shard[shards])
        firsts.append(dataset.sample_offset_per_shard[shards])
        chosen.append(_chosen(sizes[-1], int(dataset.streams[stream].choose),
                              dataset.shuffle_seed + epoch * dataset.epoch_seed_change))
    return Share(np.concatenate(sizes), np.concatenate(firsts), np.concatenate(chosen), dataset.shuffle_seed + epoch)


def _chosen(sizes: Ints, choose: int, seed: int) -> Ints:
    """How many samples of each shard, as Streaming's `get_sampling` draws them one by one."""
    total = int(sizes.sum())
    times, rest = divmod(choose, total)
    chosen = sizes * times
    if rest:
        picked = np.random.default_rng(seed).permutation(total)[:rest]
        chosen += np.bincount(np.searchsorted(sizes.cumsum(), picked, 'right'), minlength=len(sizes))
    return chosen
