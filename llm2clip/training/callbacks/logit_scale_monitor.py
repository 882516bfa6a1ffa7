# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Log the temperature as it is learned."""

from composer.core import Callback, State
from composer.loggers import Logger

from llm2clip.models.sharding import whole

__all__ = ['LogitScaleMonitor']


class LogitScaleMonitor(Callback):
    """Log ``logit_scale``, the factor on the cosine similarities, after each step."""

    def batch_end(self, state: State, logger: Logger) -> None:
        scales = [parameter for name, parameter in state.model.named_parameters()
                  if name.rsplit('.', 1)[-1] == 'logit_scale']
        if scales:
            logger.log_metrics({'logit_scale': whole(scales[0]).detach().exp().item()})
