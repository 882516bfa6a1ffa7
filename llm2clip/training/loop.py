# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Composer's training loop, in which the host does not wait for the GPU."""

import datetime
import itertools
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, Optional, Union

import composer
import torch
import torch.distributed
from composer.core import Event
from composer.core.types import TrainerMode
from composer.utils import dist

from llm2clip.training.readings import Readings

__all__ = ['Trainer', 'host_group']

Batch = Any


def host_group(timeout: float) -> Optional[torch.distributed.ProcessGroup]:
    """The ranks' processes, to reduce numbers that are on the host; None if the default group can do that, or there is
    one rank.

    Args:
        timeout: Seconds.
    """
    if dist.get_world_size() == 1 or torch.distributed.get_backend() != 'nccl':
        return None
    return torch.distributed.new_group(backend='gloo', timeout=datetime.timedelta(seconds=timeout))


class Trainer(composer.Trainer):
    """Composer's Trainer, which reads from the device what `Readings` reads and nothing else.

    Composer 0.32.1 makes the host wait for the GPU at least six times a step, and has no setting against it: ranks
    agree on the GPU on whether there is another batch, on its size, and on samples, tokens and time so far; the
    optimizer gets a closure that reads the loss, and the loss is read again for the logs.  Here, the loss goes to
    `Readings`, and numbers that the hosts have go from host to host, by gloo.

    Gradient scaling (``precision: amp_fp16``) still reads, once a step, whether a gradient has overflown.

    Args:
        readings: One of the callbacks.
        eval_first: Evaluate before the first step as well.
        options: All arguments of Composer's.
    """

    def __init__(self, readings: Readings, eval_first: bool = False, **options: Any) -> None:
        self._readings, self._eval_first = readings, eval_first
        super().__init__(**options)
        self._hosts = host_group(options.get('dist_timeout', 300.0))

    def _train_loop(self) -> None:
        if self._eval_first and self.state.timestamp.batch.value == 0:
            self.eval()
        super()._train_loop()

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Generator[Batch, Any, None]:
        """Composer's: batches as long as every rank has one."""
        state, training = self.state, trainer_mode == TrainerMode.TRAIN
        assert state.dataloader is not None
        length = None if state.dataloader_len is None else int(state.dataloader_len)
        batches = itertools.islice(state.dataloader, length)
        while True:
            if training:
                self.engine.run_event(Event.BEFORE_DATALOADER)
            batch = next(batches, None)
            if batch is None and training:
                # Ends the profiler's mark, without the event.
                self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
            if self._sum(batch is None)[0] > 0:
                return
            yield batch

    def _use_closures(self) -> bool:
        return False

    def _train_batch(self, use_grad_scaling: bool) -> Optional[dict[str, torch.Tensor]]:  # pyright: ignore
        """None, as after a step that gradient scaling has left out: Composer would read and log losses at once."""
        self._readings.losses = super()._train_batch(use_grad_scaling)
        return None

    def _train_microbatches(
        self, microbatches: Sequence[Batch], total_loss_dict: dict[str, torch.Tensor], ddp_sync: bool = True
    ) -> torch.Tensor:
        """Composer's, but the ranks' batch sizes are averaged on the host."""
        state, data = self.state, self._train_data_spec
        assert data is not None and state.optimizers is not None and state.scaler is not None and ddp_sync
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        scaled = self._use_grad_scaling(state.precision, state.scaler)
        size_of = (partial(data.get_num_tokens_in_batch, token_type='loss_generating')
                   if self.accumulate_train_batch_on_tokens else data.get_num_samples_in_batch)
        batch, size = state.batch, self._sum(sum(map(size_of, microbatches)))[0] / dist.get_world_size()
        for i, state.batch in enumerate(microbatches):
            state.batch = data.microbatch_transforms(state.device.batch_to_device(state.batch))
            for name, loss in self._train_microbatch(scaled, size, i + 1 == len(microbatches)).items():
                total = total_loss_dict.setdefault(f'loss/train/{name}', torch.zeros_like(loss).view(1))
                total += loss
        state.batch = batch
        if scaled:
            for optimizer in state.optimizers:
                state.scaler.unscale_(optimizer)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict['loss/train/total']

    def _accumulate_time_across_ranks(
        self, num_samples: Union[int, float], num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        """Sums of samples and tokens, and the time of rank 0; all on the host."""
        first = batch_time.total_seconds() if dist.get_global_rank() == 0 else 0.0
        samples, tokens, seconds = self._sum(num_samples, num_tokens, first)
        return round(samples), round(tokens), datetime.timedelta(seconds=seconds)

    def _sum(self, *numbers: float) -> list[float]:
        """Sums over the ranks."""
        if dist.get_world_size() == 1:  # whose default group, NCCL on a GPU, takes no tensor of the host
            return [float(number) for number in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._hosts)
        return sums.tolist()
