# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Log the temperature as it is learned."""

from composer.core import Callback, State
from composer.loggers import Logger

from llm2clip.models.sharding import whole

__all__ = ['LogitScaleMonitor']


class LogitScaleMonitor(Callback):
    """Log ``logit_scale``, the factor on the cosine similarities, after every batch."""

    def batch_end(self, state: State, logger: Logger) -> None:
        for name, parameter in state.model.named_parameters():
            if name.rsplit('.', 1)[-1] == 'logit_scale':
                logger.log_metrics({'logit_scale': whole(parameter).detach().exp().item()})
