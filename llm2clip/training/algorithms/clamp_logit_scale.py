# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Keep CLIP's temperature in its range."""

import math
from typing import Optional

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from llm2clip.config.ranges import Positive

__all__ = ['ClampLogitScale']


class ClampLogitScale(Algorithm):
    """Clamp every parameter called `logit_scale` to [0, ln maximum], in log space, after every optimizer step (CLIP,
    section 2.5).

    Args:
        maximum: Largest factor on the cosine similarities.
    """

    def __init__(self, maximum: Positive = 100.0) -> None:
        self.maximum = maximum

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        for name, parameter in state.model.named_parameters():
            if name.rsplit('.', 1)[-1] == 'logit_scale':
                parameter.clamp_(0, math.log(self.maximum))
