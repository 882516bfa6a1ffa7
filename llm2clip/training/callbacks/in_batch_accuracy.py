# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How often an image finds its own caption in its batch, and a caption its image."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llm2clip.losses.contrastive import all_gather
from llm2clip.metrics.retrieval import recall, retrieval_ranks
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.ranges import Count

__all__ = ['InBatchAccuracy']

_ROWS = 1024


class InBatchAccuracy(Callback):
    """Log ``train/image_to_text_accuracy`` and ``train/text_to_image_accuracy`` over the global batch.

    Args:
        interval: Batches between two measurements, each of which costs a logit matrix.
    """

    def __init__(self, interval: Count = 10) -> None:
        self.interval = interval

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.interval:
            return
        outputs: Any = state.outputs
        image, text = (outputs[name].detach() for name in ComposerLLM2CLIP.feature_names)
        own = torch.arange(len(image), device=image.device)
        right = torch.stack([own, own + dist.get_global_rank() * len(image)], 1)
        hits = [recall(retrieval_ranks(queries, all_gather(candidates), right, _ROWS), 1) / 100
                for queries, candidates in ((image, text), (text, image))]
        hits = torch.tensor(hits, device=image.device)
        dist.all_reduce(hits)
        names = 'train/image_to_text_accuracy', 'train/text_to_image_accuracy'
        logger.log_metrics({name: value / dist.get_world_size() for name, value in zip(names, hits.tolist())})
