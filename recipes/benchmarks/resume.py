# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Seconds from nothing to the first batch when a run starts, resumes in the middle, and just before an epoch's end."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_result import write_result
from streaming import MDSWriter, StreamingDataLoader

from llm2clip.data.loader import SeededDataset
from llm2clip.data.schema import SAMPLE_ID, caption_column
from llm2clip.data.streams.verified_stream import VerifiedStream

SAMPLES, BATCH, WORKERS, ROUNDS = 500_000, 256, 2, 3
SHARES = (0.0, 0.5, 0.99)


def first_batch(folder: str, share: float) -> float:
    start = time.perf_counter()
    dataset = SeededDataset([VerifiedStream(local=folder)], 0, batch_size=BATCH, shuffle=True, num_canonical_nodes=64)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)
    if share:
        seen = int(share * SAMPLES) // BATCH * BATCH
        loader.load_state_dict({'epoch': 0, 'sample_in_epoch': seen, 'num_canonical_nodes': 64, 'shuffle_seed': 9176,
                                'initial_physical_nodes': 1})
    next(iter(loader))
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        columns = {SAMPLE_ID: 'str', caption_column('short'): 'str'}
        with MDSWriter(out=folder, columns=columns, hashes=['xxh64'], size_limit='1mb') as writer:
            for i in range(SAMPLES):
                writer.write({SAMPLE_ID: f'{i}', caption_column('short'): f'caption {i}'})
        seconds: dict[float, list[float]] = {share: [] for share in SHARES}
        for _ in range(ROUNDS):
            for share in SHARES:
                # A process of its own, as a run has.
                output = subprocess.run([sys.executable, str(Path(__file__)), folder, str(share)], check=True,
                                        capture_output=True, text=True).stdout
                seconds[share].append(json.loads(output.splitlines()[-1]))
    medians = {f'{share:.0%}': statistics.median(values) for share, values in seconds.items()}
    spread = max(medians.values()) - min(medians.values())
    write_result('resume', f'seconds to the first batch of {SAMPLES:,} samples at 0, 50 and 99 % of an epoch',
                 'each other (largest difference)', spread, 2.0, spread <= 2, medians)


if __name__ == '__main__':
    if len(sys.argv) > 1:
        print(json.dumps(first_batch(sys.argv[1], float(sys.argv[2]))))
    else:
        main()
