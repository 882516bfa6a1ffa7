# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The classes of zero-shot sets, as the adapter sees them at each evaluation during training."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Optional

import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch.nn.parallel import DistributedDataParallel

from llm2clip.metrics.classification import mean_of_prompts

__all__ = ['Prompts', 'ZeroshotClasses', 'own_names']

# Prompts that the adapter sees at once, or that a text encoder in the model reads at once.
_ROWS, _TEXTS = 4096, 256


class Prompts(NamedTuple):
    """A set's prompts, as the model takes them: what a frozen teacher says of them, or the texts themselves, for a text
    encoder that is trained, or both.

    ImageNet's, 80 for each of 1,000 names, take 1.3 GB at a width of 4,096, so each rank has those of its `own_names`
    alone.
    """

    vectors: Optional[torch.Tensor]
    """``(n, P, llm_embed_dim)``, the P prompts of each of this rank's names, in float32 on the CPU."""
    names: torch.Tensor
    """``(C,)``: which of all names each class has."""
    texts: Optional[list[list[str]]] = None
    """The P prompts of each of this rank's names."""

    @property
    def per_name(self) -> int:
        """P."""
        return len(self.texts[0]) if self.vectors is None and self.texts is not None else self._shape[1]

    @property
    def _shape(self) -> torch.Size:
        assert self.vectors is not None
        return self.vectors.shape

    def blocks(self, pixels: torch.Tensor) -> Iterator[dict[str, Any]]:
        """Batches of some names' prompts each, beside an image; as many on every rank."""
        names = len(self.texts) if self.texts is not None else self._shape[0]
        size = max(1, (_ROWS if self.texts is None else _TEXTS) // self.per_name)
        for start in range(0, names, size):
            block: dict[str, Any] = {'pixel_values': pixels}
            if self.vectors is not None:
                block['text_embedding'] = self.vectors[start:start + size].flatten(0, 1).to(pixels.device)
            if self.texts is not None:
                block['caption'] = [*chain.from_iterable(self.texts[start:start + size])]
            yield block

    def any_text(self, device: torch.device) -> dict[str, Any]:
        """Of a batch whose texts do not count."""
        vector = {} if self.vectors is None else {'text_embedding': torch.zeros(1, self._shape[-1], device=device)}
        return vector if self.texts is None else {**vector, 'caption': ['-']}


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
        state.batch.update(class_features=self._features, **prompts.any_text(pixels.device))


def _class_features(model: Any, prompts: Prompts, pixels: torch.Tensor) -> torch.Tensor:
    """``(C, D)`` in float32 on the device of the pixels."""
    own = [mean_of_prompts(model(block)[model.tested].unflatten(0, (-1, prompts.per_name)))
           for block in prompts.blocks(pixels)]
    # A name of each rank, then the next of each.
    gathered: Sequence[torch.Tensor] = dist.all_gather(torch.cat(own))
    return torch.stack(list(gathered), dim=1).flatten(0, 1)[prompts.names.to(pixels.device)]
