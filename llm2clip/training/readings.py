# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What is measured on the device and read once per `log_interval`, all together.

A value that is read makes the host wait until the GPU has computed it, and the GPU idle until the host has given it new
work.  So no part of a training reads values itself: it is `Measured`, and `Readings` reads for all.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Union, runtime_checkable

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

__all__ = ['Measured', 'Readings']

Values = Mapping[str, Union[torch.Tensor, float]]


@runtime_checkable
class Measured(Protocol):
    """A callback or an algorithm with values to read."""

    def measure(self, state: State) -> Values:
        """Values of this rank since the last reading, on any device: the same names and shapes on every rank.

        Called when a step is complete, algorithms like `ClampLogitScale` included.
        """
        ...

    def report(self, values: Mapping[str, Any], state: State) -> Mapping[str, float]:
        """What is logged, from the values' means over the ranks, which are numbers or lists like what was measured."""
        ...


class Readings(Callback):
    """Read what every `Measured` part of the training has measured, and log it as of the step that has just ended.

    That is once per interval, and also at the end of an epoch and of the training, and before every checkpoint and
    evaluation, so that nothing is written that was not looked at.

    It comes before other callbacks, which log what they do as of the next step.

    Args:
        interval: Such as ``10ba``.
    """

    def __init__(self, interval: str = '1ba') -> None:
        self._due = create_interval_scheduler(interval, checkpoint_events=False, final_events={Event.BATCH_END})
        self.losses: dict[str, torch.Tensor] = {}
        """This rank's of the last step, by their names in the logs."""
        self._unread = False

    def batch_end(self, state: State, logger: Logger) -> None:
        self._unread = True
        if self._due(state, Event.BATCH_END) or _ends_epoch(state) or _is_looked_at(state):
            self._read(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self._unread:  # of data whose end comes as a surprise
            self._read(state, logger)

    def _read(self, state: State, logger: Logger) -> None:
        self._unread = False
        parts: list[Measured] = [self, *(part for part in (*state.algorithms, *state.callbacks)
                                         if isinstance(part, Measured) and part is not self)]
        measured = [{name: torch.as_tensor(value) for name, value in part.measure(state).items()} for part in parts]
        read = iter(_means([value for values in measured for value in values.values()], state))
        metrics: dict[str, float] = {}
        for part, values in zip(parts, measured):
            metrics.update(part.report({name: next(read) for name in values}, state))
        logger.log_metrics(metrics, step=state.timestamp.batch.value - 1)

    def measure(self, state: State) -> Values:
        return self.losses

    def report(self, values: Mapping[str, Any], state: State) -> Mapping[str, float]:
        """The losses, which are put where Composer keeps them."""
        state.total_loss_dict = {name: value for name, [value] in values.items()}
        return state.total_loss_dict


def _means(values: list[torch.Tensor], state: State) -> list[Any]:
    """Means over ranks, in one operation and one copy to the host."""
    flat = [state.device.tensor_to_device(value.detach()).double().flatten() for value in values]
    together = torch.cat(flat) if flat else torch.zeros(0)
    if flat:
        dist.all_reduce(together)
    read = (together / dist.get_world_size()).cpu().split([len(value) for value in flat])
    return [part.view(value.shape).tolist() for part, value in zip(read, values)]


def _ends_epoch(state: State) -> bool:
    return state.dataloader_len is not None and state.timestamp.batch_in_epoch == state.dataloader_len


def _is_looked_at(state: State) -> bool:
    """Whether a checkpoint or an evaluation follows this batch."""
    savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
    return (any(saver.save_interval(state, Event.BATCH_CHECKPOINT) for saver in savers)
            or any(evaluator.eval_interval(state, Event.BATCH_END) for evaluator in state.evaluators
                   if evaluator.eval_interval is not None))
