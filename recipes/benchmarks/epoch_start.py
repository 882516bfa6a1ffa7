# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Until the first sample of an epoch is known: index and order as the project makes them, against Streaming's.

Each dataset is an index alone, 5,000 samples in a shard, and read in a process of its own as on a node of 8 ranks with
8 workers each.  Streaming is not asked for more than 100 million samples: a billion would take it 50 GB.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from bench_result import write_result
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.world import World

from llm2clip.data.streams.epoch_order import epoch_order
from llm2clip.data.streams.verified_stream import VerifiedStream

SHARD, COMPARED, SIZES = 5000, 10**8, (3 * 10**6, 3 * 10**7, 10**8, 10**9)
READERS: Any = SimpleNamespace(num_nodes=1, ranks_per_node=8, workers_per_rank=8)


def write_index(folder: str, samples: int) -> None:
    entry = {'column_encodings': ['str', 'bytes', 'str'], 'column_names': ['sample_id', 'image', 'caption.raw'],
             'column_sizes': [None] * 3, 'compression': None, 'format': 'mds', 'hashes': ['xxh64'], 'samples': SHARD,
             'size_limit': 1 << 28, 'version': 2, 'zip_data': None}
    Path(folder, 'index.json').write_text(json.dumps({'version': 2, 'shards': [
        {**entry, 'raw_data': {'basename': f'shard.{k:06}.mds', 'bytes': 1 << 28, 'hashes': {'xxh64': f'{k:016x}'}}}
        for k in range(samples // SHARD)]}))


def start(folder: str, samples: int, ours: bool) -> dict[str, float]:
    """Seconds of CPU and bytes until a node knows what it reads first."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    stream = (VerifiedStream if ours else Stream)(local=folder)
    stream.apply_default({'split': None, 'download_retry': 1, 'download_timeout': 10., 'validate_hash': None,
                          'keep_zip': False})
    shards: Any = stream.get_shards(World.detect(), False)
    sizes = shards.samples if ours else np.array([shard.samples for shard in shards])
    index = time.process_time() - begun
    dataset: Any = object.__new__(StreamingDataset)
    dataset.streams, dataset.num_streams = [stream], 1
    dataset.samples_per_shard, dataset.sample_offset_per_shard = sizes, sizes.cumsum() - sizes
    dataset.shards_per_stream, dataset.shard_offset_per_stream = np.array([len(sizes)]), np.array([0])
    dataset.epoch_size = Stream.apply_weights([stream], np.array([samples]), None, 0)
    dataset.sampling_method, dataset.sampling_granularity = 'balanced', 1
    dataset.partition_algo, dataset.shuffle_algo, dataset.batching_method = 'relaxed', 'py1e', 'random'
    dataset.shuffle = dataset.epoch_seed_change = True
    dataset.shuffle_seed, dataset.shuffle_block_size, dataset.batch_size = 9176, 1 << 18, 64
    dataset.num_canonical_nodes, dataset.initial_physical_nodes = 64, None
    if ours:
        order = epoch_order(dataset, READERS, 0, 0)
        assert order is not None
        order.piece(0, 0, 1024)
    else:
        generate_work('random', dataset, READERS, 0, 0)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {'index_seconds': index, 'seconds': time.process_time() - begun, 'bytes': 1024 * taken}


def main() -> None:
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for samples in SIZES:
            write_index(folder, samples)
            for name in ('project', 'streaming')[:1 + (samples <= COMPARED)]:
                found = subprocess.run([sys.executable, __file__, folder, str(samples), name], check=True,
                                       stdout=subprocess.PIPE).stdout
                medians[f'{name}_{samples}'] = json.loads(found.splitlines()[-1])
                print(f'{samples:>13,} samples, {name}: {medians[f"{name}_{samples}"]}', flush=True)
    ratio, seconds = (medians[f'project_{COMPARED}'][what] / medians[f'streaming_{COMPARED}'][what]
                      for what in ('bytes', 'seconds'))
    write_result('epoch_start', f'memory until the first of {COMPARED:,} samples is known', 'Streaming itself', ratio,
                 0.3, ratio <= 0.3 and seconds <= 1, {**medians, 'ratio_of_seconds': seconds})


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(start(sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'project')))
    else:
        main()
