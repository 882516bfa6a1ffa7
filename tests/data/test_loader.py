# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What loaders put into shared memory: the bound is that of real workers."""

import mmap
import multiprocessing
import os
import time
from pathlib import Path

import torch

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.loader import shared_memory

BATCH, IMAGE_SIZE = 8, 32


def test_each_tensor_counts_in_whole_pages_without_data() -> None:
    batch = {'sample_id': ['0'] * 512, 'text_id': torch.empty(512, dtype=torch.long, device='meta'),
             'pixel_values': torch.empty(512, 3, 336, 336, dtype=torch.uint8, device='meta')}
    # 8 ranks of 8 workers with 2 batches each.
    assert shared_memory(batch, 8, 8, 3_000_000) == 128 * (512 * 3 * 336 ** 2 + mmap.PAGESIZE) + 24_000_000


def _shared() -> int:
    """Bytes of the memory that torch shares between this process and its workers."""
    files = {}
    for pid in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
        for name in os.listdir(f'/proc/{pid}/fd'):
            try:
                if os.readlink(f'/proc/{pid}/fd/{name}').startswith('/dev/shm/torch_'):
                    status = os.stat(f'/proc/{pid}/fd/{name}')
                    files[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:  # closed since
                continue
    return sum(files.values())


def test_the_bound_is_what_real_workers_fill(image_dataset: Path, embeddings: Path, no_leftovers: None) -> None:
    stream = ImageStreamConfig(str(image_dataset), embeddings={'tiny': DatasetConfig(str(embeddings))})
    config = ImageDataConfig(streams={'s': stream}, num_workers=2, num_canonical_nodes=1)
    batches = iter(build_image_loader(config, IMAGE_SIZE, BATCH, 5, train=True).dataloader)
    held = next(batches)
    # Two for each worker, and the one that is held here, which is not pinned.
    expected = shared_memory(held, 2) + shared_memory(held, 1) // 2
    assert expected > 5 * BATCH * 3 * IMAGE_SIZE ** 2
    for _ in range(1000):
        if _shared() >= expected:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    assert _shared() == expected
