# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How often an image finds its own caption in its batch, and a caption its image."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.losses.contrastive import all_gather
from llm2clip.models.llm2clip import ComposerLLM2CLIP

__all__ = ['InBatchAccuracy', 'share_of_hits']


@torch.no_grad()
def share_of_hits(queries: torch.Tensor, candidates: torch.Tensor, first: int, block_size: int = 1024) -> torch.Tensor:
    """Share of queries whose right candidate scores above every other one.

    Args:
        queries: ``(B, D)``.
        candidates: ``(N, D)``; that of query i is ``first + i``.
        first: Candidate of the first query.
        block_size: Queries scored at once.
    """
    hits = queries.new_zeros(())
    for start in range(0, len(queries), block_size):
        scores = queries[start:start + block_size].float() @ candidates.float().T
        right = scores.diagonal(first + start)
        hits += ((scores >= right[:, None]).sum(1) == 1).sum()
    return hits / len(queries)


class InBatchAccuracy(Callback):
    """Log ``train/image_to_text_accuracy`` and ``train/text_to_image_accuracy`` over the global batch.

    Args:
        interval: Batches between two measurements, each of which costs a logit matrix.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.interval:
            return
        outputs: Any = state.outputs
        image, text = (outputs[name].detach() for name in ComposerLLM2CLIP.feature_names)
        first = dist.get_global_rank() * len(image)
        hits = torch.stack([share_of_hits(image, all_gather(text), first),
                            share_of_hits(text, all_gather(image), first)])
        dist.all_reduce(hits)
        names = 'train/image_to_text_accuracy', 'train/text_to_image_accuracy'
        logger.log_metrics({name: value / dist.get_world_size() for name, value in zip(names, hits.tolist())})
