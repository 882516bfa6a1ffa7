# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What loaders put into shared memory and what they pin: the bound is that of real workers, the warning names a key."""

import mmap
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parts import write_sidecar
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory

from llm2clip.config import (
    CaptionDataConfig,
    CaptionPairConfig,
    CaptionStreamConfig,
    DatasetConfig,
    ImageDataConfig,
    ImageStreamConfig,
    MNTPConfig,
    TextEncoderConfig,
)
from llm2clip.data.caption_pairs import build_caption_pair_loader
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.loader import SeededDataset
from llm2clip.data.masked_texts import build_masked_text_loader
from llm2clip.data.shared_memory import batch_bytes, shared_memory
from llm2clip.teacher.text_encoder import load_caption_tokenizer

BATCH, IMAGE_SIZE = 8, 32
Loader = torch.utils.data.DataLoader


def _images(images: Path, *sidecars: Path, workers: int = 0, train: bool = True, online: bool = False) -> Loader:
    embeddings = {f'{i}': DatasetConfig(str(sidecar)) for i, sidecar in enumerate(sidecars)}
    config = ImageDataConfig(
        streams={'s': ImageStreamConfig(str(images), embeddings=embeddings)}, caption_mix={'short': 1, 'long': 1},
        teachers=list(embeddings), num_workers=workers, num_canonical_nodes=1)
    return build_image_loader(config, IMAGE_SIZE, BATCH, 5, train, 'train_data', online).dataloader


def _dataset(loader: Loader) -> SeededDataset:
    assert isinstance(loader.dataset, SeededDataset)
    return loader.dataset


def test_each_tensor_counts_in_whole_pages_with_or_without_data() -> None:
    sizes = {'pixel_values': (512, 3, 336, 336), 'text_id': (512,)}
    kinds = {'pixel_values': torch.uint8, 'text_id': torch.long}

    def batch(device: str) -> dict[str, Any]:
        return {'sample_id': ['0'] * 512, **{name: torch.empty(sizes[name], dtype=kinds[name], device=device)
                                             for name in sizes}}

    expected = 512 * 3 * 336 ** 2 + mmap.PAGESIZE
    assert batch_bytes(batch('meta')) == expected
    with FakeTensorMode():
        assert batch_bytes(batch('cpu')) == expected
    # 8 ranks of 8 workers with 2 batches each, which took 83 GiB in float32.
    assert shared_memory(batch('meta'), 8, ranks=8) == 128 * expected < 83.2 / 4 * 2**30
    assert shared_memory(batch('meta'), 8, 4, 8, 3_000_000) == 256 * expected + 24_000_000
    assert shared_memory(batch('meta'), 8, pinned=False) == 18 * expected
    assert shared_memory(batch('meta'), 0, pinned=False) == 0


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
    of_one = batch_bytes(held)
    assert of_one > BATCH * 3 * IMAGE_SIZE ** 2
    # Two for each worker and the one that is held here; the bound has room for the next one besides.
    expected = shared_memory(held, 2, pinned=False) - of_one
    for _ in range(1000):
        if _shared() >= expected:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    assert _shared() == expected == 5 * of_one


def _texts(folder: Path, **options: Any) -> CaptionDataConfig:
    return CaptionDataConfig(streams={'s': CaptionStreamConfig(str(folder))}, num_workers=0, num_canonical_nodes=1,
                             **options)


def test_the_largest_sample_has_the_tensors_of_a_batch(
    image_dataset: Path, sidecar: Path, text_pairs_dataset: Path, teacher_folder: Path, llm_folder: Path,
    tmp_path: Path, no_leftovers: None
) -> None:
    """And nothing warns of pinned memory where there is no GPU."""
    int8 = tmp_path / 'int8'
    write_sidecar(image_dataset, int8, teacher_folder, storage='int8')
    tokenizer = load_caption_tokenizer(TextEncoderConfig(pretrained=str(llm_folder), max_length=48))
    pair = CaptionPairConfig(['query'], ['positive'], 'negative')
    loaders: list[Callable[[], Loader]] = [
        *(partial(_images, image_dataset, *sidecars, train=train, online=online) for train in (True, False)
          for sidecars, online in (([sidecar], False), ([int8], False), ([int8, sidecar], False), ([sidecar], True))),
        lambda: build_caption_pair_loader(_texts(image_dataset), tokenizer, BATCH, 5, True, 'd').dataloader,
        lambda: build_caption_pair_loader(
            _texts(text_pairs_dataset, pairs=[pair]), tokenizer, BATCH, 5, True, 'd').dataloader,
        lambda: build_masked_text_loader(
            _texts(image_dataset, texts={'long': 1.0}), tokenizer, MNTPConfig(), BATCH, 5, 'd').dataloader,
    ]
    with warnings.catch_warnings(action='error', category=UserWarning):
        for make in loaders:
            loader = make()
            assert not loader.pin_memory
            batch, largest = next(iter(loader)), _dataset(loader).largest
            found, expected = ({name: value for name, value in of.items() if isinstance(value, torch.Tensor)}
                               for of in (batch, largest))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert len(value) == 1 and value.dtype == found[name].dtype
                # Texts are padded to the longest of a batch.
                length = 48 if value.shape[1:] == (48,) else None
                assert found[name].shape[1:] == value.shape[1:] if length is None else found[name].shape[1] <= length
            del loader, batch


def test_a_full_shared_memory_is_foreseen(
    image_dataset: Path, sidecar: Path, monkeypatch: pytest.MonkeyPatch, no_leftovers: None
) -> None:
    needed = shared_memory(next(iter(_images(image_dataset, sidecar))), 1, epoch_samples=64, pinned=False)
    free = [needed - 1]
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=free[0]))
    with pytest.warns(UserWarning, match=r'^train_data\.num_workers: at 1, workers may fill 0\.0 GiB of'):
        _images(image_dataset, sidecar, workers=1)
    free[0] = needed
    with warnings.catch_warnings(action='error', category=UserWarning):
        _images(image_dataset, sidecar, workers=1)


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
