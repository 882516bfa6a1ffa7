# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How much of a node's shared memory a loader fills: workers put batches there, and one of them an epoch's order."""

import mmap
from collections.abc import Mapping
from typing import Any, Optional

import torch

__all__ = ['batch_bytes', 'shared_memory']


def batch_bytes(batch: Mapping[str, Any]) -> int:
    """Bytes of shared memory that a batch takes: those of its tensors, each in whole pages.  Lists take none.

    Args:
        batch: On any device, also without data (fake tensors, or those of the meta device).
    """
    sizes = [value.numel() * value.element_size() for value in batch.values() if isinstance(value, torch.Tensor)]
    return sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)


def shared_memory(
    batch: Mapping[str, Any], num_workers: int, prefetch_factor: Optional[int] = None, ranks: int = 1,
    epoch_samples: int = 0, pinned: bool = True,
) -> int:
    """Most bytes of ``/dev/shm`` that a loader fills on a node, but for a few pages of Streaming's own.

    Args:
        batch: A rank's at its largest, as the workers deliver it and as `batch_bytes` takes it.
        num_workers: Of each rank.
        prefetch_factor: Batches that each worker prepares ahead; unset, torch's 2.
        ranks: On the node.
        epoch_samples: Of the dataset, in one epoch, whose order lies there while it is drawn.
        pinned: Whether a batch is copied to pinned memory before the training takes it, as on a GPU.  Otherwise the
            training holds one in shared memory, and the one before it while it takes the next.
    """
    batches = num_workers * (prefetch_factor or 2) + (0 if pinned or not num_workers else 2)
    return ranks * batches * batch_bytes(batch) + 8 * epoch_samples
