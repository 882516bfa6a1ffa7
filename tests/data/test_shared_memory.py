# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What loaders put into shared memory and what they pin: the bound is that of real workers, the warning names a key."""

import mmap
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory

from llm2clip.config import (
    DatasetConfig,
    ImageDataConfig,
    ImageStreamConfig,
)
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.loader import shared_memory

BATCH, IMAGE_SIZE = 8, 32
Loader = torch.utils.data.DataLoader


def _images(images: Path, *sidecars: Path, workers: int = 0, train: bool = True, online: bool = False) -> Loader:
    embeddings = {f'{i}': DatasetConfig(str(sidecar)) for i, sidecar in enumerate(sidecars)}
    config = ImageDataConfig(
        streams={'s': ImageStreamConfig(str(images), embeddings=embeddings)}, caption_mix={'short': 1, 'long': 1},
        teachers=list(embeddings), num_workers=workers, num_canonical_nodes=1)
    return build_image_loader(config, IMAGE_SIZE, BATCH, 5, train, 'train_data', online).dataloader


def test_each_tensor_counts_in_whole_pages_with_or_without_data() -> None:
    sizes = {'pixel_values': (512, 3, 336, 336), 'text_id': (512,)}
    kinds = {'pixel_values': torch.uint8, 'text_id': torch.long}

    def batch(device: str) -> dict[str, Any]:
        return {'sample_id': ['0'] * 512, **{name: torch.empty(sizes[name], dtype=kinds[name], device=device)
                                             for name in sizes}}

    expected = 512 * 3 * 336 ** 2 + mmap.PAGESIZE
    # 8 ranks of 8 workers with 2 batches each.
    assert shared_memory(batch('meta'), 8, 8, 3_000_000) == 128 * expected + 24_000_000
    with FakeTensorMode():
        assert shared_memory(batch('cpu'), 8) == 16 * expected
    assert shared_memory(batch('meta'), 0) == 0


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


def test_the_bound_is_what_real_workers_fill(image_dataset: Path, sidecar: Path, no_leftovers: None) -> None:
    batches = iter(_images(image_dataset, sidecar, workers=2))
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


def test_batches_are_pinned_for_a_gpu_and_texts_survive_it(
    image_dataset: Path, sidecar: Path, monkeypatch: pytest.MonkeyPatch, no_leftovers: None
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    loader = _images(image_dataset, sidecar, train=False, online=True)
    assert loader.pin_memory
    loader.pin_memory = False  # since there is none
    batch = next(iter(loader))
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self, device: copied.append(self) or self.clone())
    pinned = pin_memory(batch, 'cuda')
    assert pinned.keys() == batch.keys() and pinned['sample_id'] == batch['sample_id']
    assert list(map(list, pinned['caption'])) == list(map(list, batch['caption']))
    assert len(copied) == 3 and all(torch.equal(pinned[name], batch[name])
                                    for name in ('index', 'pixel_values', 'text_id'))
