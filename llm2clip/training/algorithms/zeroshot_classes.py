# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The classes of zero-shot sets, as the adapter sees them at each evaluation during training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch.nn.parallel import DistributedDataParallel

from llm2clip.metrics.classification import mean_of_prompts

__all__ = ['Prompts', 'ZeroshotClasses', 'own_names']

# Prompts that the adapter sees at once.
_ROWS = 4096


class Prompts(NamedTuple):
    """What the teacher says of a set's prompts.  ImageNet's, 80 for each of 1,000 names, take 1.3 GB at a width of
    4,096, so each rank has those of its `own_names` alone."""

    vectors: torch.Tensor
    """``(n, P, llm_embed_dim)``, the P prompts of each of this rank's names, in float32 on the CPU."""
    names: torch.Tensor
    """``(C,)``: which of all names each class has."""


def own_names(count: int) -> list[int]:
    """Which of `count` names are this rank's: every so-many-th; equally many on every rank, the first ones again where
    there are no more."""
    ranks = dist.get_world_size()
    return [at % count for at in range(dist.get_global_rank(), -(-count // ranks) * ranks, ranks)]


class ZeroshotClasses(Algorithm):
    """Give the evaluation batches of zero-shot sets their ``class_features`` ``(C, D)``, by the weights that are
    evaluated.

    At the first batch of each evaluation, the ranks share the prompts, and each gets the features of all classes.

    Args:
        prompts: Label of an evaluator -> the prompts of its set.
    """

    def __init__(self, prompts: Mapping[str, Prompts]) -> None:
        self.prompts = prompts
        self._features = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.EVAL_BEFORE_FORWARD and state.dataloader_label in self.prompts

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        assert state.dataloader_label is not None
        prompts, pixels = self.prompts[state.dataloader_label], state.batch['pixel_values']
        if state.eval_timestamp.batch.value == 0:
            model: Any = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
            with get_precision_context(state.precision, state.precision_config):
                self._features = _class_features(model, prompts, pixels[:1])
        # Each forward pass is whole, of an image and a text at least: FSDP2 may have begun to gather the weights of the
        # part that comes next, and would otherwise keep them until that part is run, with other weights maybe.
        text = pixels.new_zeros(1, prompts.vectors.shape[-1], dtype=torch.float32)
        state.batch.update(class_features=self._features, text_embedding=text)


def _class_features(model: Any, prompts: Prompts, pixels: torch.Tensor) -> torch.Tensor:
    """``(C, D)`` in float32 on the device of the pixels."""
    vectors = prompts.vectors
    own: list[torch.Tensor] = []
    for block in vectors.split(max(1, _ROWS // vectors.shape[1])):
        texts = block.flatten(0, 1).to(pixels.device)
        features = model({'pixel_values': pixels, 'text_embedding': texts})['text_features']
        own.append(mean_of_prompts(features.unflatten(0, block.shape[:2])))
    # A name of each rank, then the next of each.
    gathered: Sequence[torch.Tensor] = dist.all_gather(torch.cat(own))
    return torch.stack(list(gathered), dim=1).flatten(0, 1)[prompts.names.to(pixels.device)]
