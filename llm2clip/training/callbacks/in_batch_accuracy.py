# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How often an image finds its own caption in its batch, and a caption its image."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.float32 import in_float32
from llm2clip.losses.gather import all_gather, first_row
from llm2clip.models.llm2clip import ComposerLLM2CLIP

__all__ = ['InBatchAccuracy', 'share_found']

_ROWS = 1024


@in_float32
def share_found(queries: torch.Tensor, candidates: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Share of queries that score higher with their partner than with any other candidate, a scalar on the device.

    Args:
        queries: ``(Q, D)``.
        candidates: ``(C, D)``; the partner of query i is candidate ``first + i``.
        first: The first query's partner.
    """
    found = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start:start + _ROWS].float() @ candidates.float().T
        found.append((scores >= scores.diagonal(first + start)[:, None]).sum(1) == 1)
    return torch.cat(found).float().mean()


class InBatchAccuracy(Callback):
    """Log ``train/image_to_text_accuracy`` and ``train/text_to_image_accuracy`` over the global batch; of several texts
    of an image, the first counts."""

    def batch_end(self, state: State, logger: Logger) -> None:
        outputs: Any = state.outputs
        image, text = (outputs[name].detach() for name in ComposerLLM2CLIP.feature_names)
        text = text if text.ndim == 2 else text[:, 0]
        first = first_row(image)
        found = torch.stack([share_found(image, all_gather(text), first), share_found(text, all_gather(image), first)])
        dist.all_reduce(found)
        names = ('train/image_to_text_accuracy', 'train/text_to_image_accuracy')
        logger.log_metrics(dict(zip(names, (found / dist.get_world_size()).tolist())))
