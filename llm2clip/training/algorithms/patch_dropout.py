# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Train on a part of each image's patches (FLIP, Li et al. 2022, arXiv 2212.00794)."""

from typing import Annotated, Optional

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from pydantic import Field

from llm2clip.models.vision_encoder import VisionEncoder

__all__ = ['PatchDropout']


class PatchDropout(Algorithm):
    """Let every vision tower of a model leave out a share of the patches while it trains.

    Which ones follows from the ``sample_seed`` of the batch, and so not from the microbatch or the rank.

    Args:
        rate: Share of the patches to leave out.

    Raises:
        ConfigError: The tower has no patches.
    """

    def __init__(self, rate: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> None:
        self.rate = rate

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        for module in state.model.modules():
            if isinstance(module, VisionEncoder):
                module.drop_patches(self.rate)
