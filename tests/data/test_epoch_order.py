# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The order of an epoch, piece by piece, against Streaming's, which is made at once."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.spanner import Spanner

from llm2clip.data.streams import shared_order
from llm2clip.data.streams.epoch_order import epoch_order
from llm2clip.data.streams.shard_table import ShardOfSample
from llm2clip.data.streams.shared_order import OrderWriter, SampleIds

Case = tuple[Any, Any, int, int]


def make_case(number: int) -> Case:
    """A dataset without files, who reads it, an epoch and how many samples of it have been read."""
    draw = random.Random(number)
    sizes = [[draw.randrange(5, 60)] * draw.randrange(3, 20) + [draw.randrange(1, 40)]
             for _ in range(draw.choice([1, 1, 2, 3]))]
    weights = draw.choice([lambda: {}, lambda: {'proportion': draw.random() + 0.1},
                           lambda: {'repeat': draw.choice([0.5, 1, 1.5, 2])}])
    dataset = object.__new__(StreamingDataset)
    dataset.streams = [Stream(local='unread', **weights()) for _ in sizes]
    dataset.num_streams = len(sizes)
    dataset.samples_per_shard = np.array(sum(sizes, []))
    dataset.sample_offset_per_shard = dataset.samples_per_shard.cumsum() - dataset.samples_per_shard
    dataset.shards_per_stream = np.array([len(stream) for stream in sizes])
    dataset.shard_offset_per_stream = dataset.shards_per_stream.cumsum() - dataset.shards_per_stream
    dataset.epoch_size = Stream.apply_weights(dataset.streams, np.array([sum(stream) for stream in sizes]), None, 5)
    dataset.sampling_method, dataset.sampling_granularity = 'balanced', 1
    dataset.partition_algo, dataset.shuffle_algo = 'relaxed', 'py1e'
    dataset.shuffle = dataset.epoch_seed_change = draw.random() < 0.8
    dataset.shuffle_seed, dataset.shuffle_block_size = draw.randrange(1000), draw.choice([40, 200, 1 << 18])
    dataset.batching_method = draw.choice(['random', 'per_stream'])
    dataset.num_canonical_nodes, dataset.initial_physical_nodes = draw.choice([1, 2, 4, 8]), None
    nodes, ranks, dataset.batch_size = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3]), draw.choice([1, 2, 5])
    if draw.random() < 0.2:  # begun on other nodes than it goes on on
        dataset.initial_physical_nodes, dataset.batch_size, nodes = nodes, dataset.batch_size * nodes, 3
    world = SimpleNamespace(num_nodes=nodes, ranks_per_node=ranks, workers_per_rank=draw.choice([1, 2, 3]))
    batch = nodes * ranks * dataset.batch_size
    return dataset, world, draw.randrange(3), batch * draw.choice([0, draw.randrange(dataset.epoch_size // batch + 1)])


def whole(case: Case) -> NDArray[np.int64]:
    dataset, *rest = case
    return generate_work(dataset.batching_method, dataset, *rest)


def test_the_order_is_that_of_streaming() -> None:
    """Any weights, batching, nodes, ranks, workers, seeds and resumptions, in pieces of any size."""
    tried = 0
    for number in range(200):
        case = make_case(number)
        try:
            expected = whole(case)
        except ValueError:  # too few samples
            continue
        order = epoch_order(*case)
        assert order is not None and order.batches == expected.shape[3], number
        draw = random.Random(number)
        for node, of_node in enumerate(expected):
            begin, pieces = 0, [np.empty((*of_node.shape[:2], 0, of_node.shape[3]), int)]
            while begin < order.batches:
                end = begin + draw.randrange(1, 9)
                pieces.append(order.piece(node, begin, end))
                begin = end
            assert np.array_equal(np.concatenate(pieces, 2), of_node), number
            for rank, worker in np.ndindex(of_node.shape[:2]):
                assert order.count(node, rank, worker) == np.count_nonzero(of_node[rank, worker] >= 0), number
        tried += 1
    assert tried > 150


def test_it_may_begin_anywhere_and_go_back() -> None:
    case = next(case for case in map(make_case, range(1000)) if case[0].shuffle and case[0].batching_method == 'random'
                and case[0].shuffle_block_size == 40 and whole(case).shape[3] > 30)
    expected, order = whole(case)[0], epoch_order(*case)
    assert order is not None
    for begin in (25, 3, 17, 0):
        assert np.array_equal(order.piece(0, begin, begin + 4), expected[:, :, begin:begin + 4])


def test_what_cannot_be_divided_is_refused() -> None:
    dataset, world, *rest = next(case for case in map(make_case, range(1000))
                                 if case[0].num_canonical_nodes == 8 and case[0].batching_method == 'random')
    world.num_nodes, dataset.initial_physical_nodes = 3, None
    with pytest.raises(ValueError, match='num_canonical_nodes is 8, expected a multiple or a divisor .* nodes, 3'):
        epoch_order(dataset, world, *rest)


def test_workers_read_what_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its own samples, also where another piece is there already, and no piece stays."""
    monkeypatch.setattr(shared_order, '_PIECE_SAMPLES', 1)
    monkeypatch.setattr(shared_order, '_PIECE_BATCHES', 3)
    case = next(case for case in map(make_case, range(1000)) if case[1].workers_per_rank == 3 and
                case[1].ranks_per_node == 2 and whole(case).shape[3] > 20)
    expected, order, errors = whole(case)[0], epoch_order(*case), []
    assert order is not None
    writer = OrderWriter(order, 0, tmp_path / 'order', lambda future: errors.append(future.exception()))
    workers = {(rank, worker): SampleIds(order, tmp_path / 'order', (0, rank, worker),
                                         writer if rank == worker == 0 else None, lambda: None)
               for rank, worker in np.ndindex(2, 3)}
    for i in range(expected[0, 0].size):
        for (rank, worker), ids in workers.items():
            assert ids[i] == expected[rank, worker].flat[i] and len(ids) == expected[rank, worker].size
        # A thread that is behind reads on.
        assert workers[0, 0][max(i - 2, 0)] == expected[0, 0].flat[max(i - 2, 0)]
        assert len(list(tmp_path.iterdir())) <= 5
    writer.close()
    assert not any(errors) and not list(tmp_path.iterdir())


def test_who_waits_for_a_piece_learns_that_there_will_be_none(tmp_path: Path) -> None:
    order = epoch_order(*make_case(0))
    assert order is not None

    def fail() -> None:
        raise RuntimeError('the other process has failed')

    with pytest.raises(RuntimeError, match='has failed'):
        SampleIds(order, tmp_path / 'order', (0, 0, 0), None, fail)[0]


def test_the_shard_of_a_sample() -> None:
    sizes = np.array([5, 1, 3000, 7, 1024, 1])
    ours, theirs = ShardOfSample(sizes), Spanner(sizes.copy())
    assert [ours[i] for i in range(sizes.sum())] == [theirs[i] for i in range(sizes.sum())]
    for outside in (-1, sizes.sum()):
        with pytest.raises(IndexError):
            ours[outside]
