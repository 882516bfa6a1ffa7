# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Log the temperature as it is learned."""

from collections.abc import Mapping
from typing import Any

from composer.core import Callback, State

from llm2clip.models.sharding import whole

__all__ = ['LogitScaleMonitor']


class LogitScaleMonitor(Callback):
    """Log ``logit_scale``, the factor on the cosine similarities, as the step leaves it."""

    def measure(self, state: State) -> dict[str, Any]:
        scales = [parameter for name, parameter in state.model.named_parameters()
                  if name.rsplit('.', 1)[-1] == 'logit_scale']
        return {'logit_scale': whole(scales[0]).detach().exp().sum()} if scales else {}

    def report(self, values: Mapping[str, Any], state: State) -> Mapping[str, float]:
        return values
