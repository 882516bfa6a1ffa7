# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Monitors of a run: metrics of a step, stop at non-finite values, best weights, progress bar."""

import math
import sys
import time
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import torch
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger, ProgressBarLogger
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils import get_total_norm

from llm2clip.data.text_batches import text_sides
from llm2clip.io.tensors import read_safetensors, write_safetensors
from llm2clip.models.sharding import unwrapped_name, whole
from llm2clip.ranks import broadcast_from_rank0, dist, is_first
from llm2clip.training.runs import BEST_FILE

# Batches after which waiting for data is judged, and the share of the time above which it is too long.
_WAITS = 100
_WAITING_SHARE = 0.1


class StepMonitor(Algorithm):
    """Log ``gradient_norm``, the L2 norm of a step's gradients before clipping; ``weight_norm``, that of the
    trained weights after the step; ``logit_scale``, the factor on the cosine similarities; and
    ``time/data_wait``, the seconds that rank 0 waited for the batch.  Warn after 100 steps if it waited for a
    tenth of the time.  With `per_parameter`, log ``gradient_norm/<name>`` of each parameter, too.

    All values are read once, after the optimizer, so that no step waits for the GPU.  It is an algorithm
    because callbacks run after all algorithms: clipping, and `GradCache`'s first pass.
    """

    def __init__(self, per_parameter: bool = False) -> None:
        self.per_parameter = per_parameter
        self.weight_norm = 0.0
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self._start = time.monotonic()
        self._batches = 0  # of this process
        self._waited = 0.0  # seconds, without those for the first batch
        self._first_batch = self._start

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.AFTER_TRAIN_BATCH,
                         Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        if event == Event.BEFORE_DATALOADER:
            self._start = time.monotonic()
        elif event == Event.AFTER_DATALOADER:
            wait = time.monotonic() - self._start
            logger.log_metrics({'time/data_wait': wait})
            self._warn_of_waits(wait)
        elif event == Event.AFTER_TRAIN_BATCH:
            gradients: dict[str, torch.Tensor] = {}
            for name, parameter in state.model.named_parameters():
                if parameter.grad is not None:
                    gradients[f'gradient_norm/{unwrapped_name(name)}'] = parameter.grad
            self._gradient_norms = {'gradient_norm': get_total_norm(gradients.values())}
            if self.per_parameter:
                for name, gradient in gradients.items():
                    self._gradient_norms[name] = get_total_norm([gradient])
        else:
            self._log_step(state, logger)

    def _log_step(self, state: State, logger: Logger) -> None:
        trained = [weight for weight in state.model.parameters() if weight.requires_grad]
        values = self._gradient_norms | {'weight_norm': get_total_norm(trained)}
        for name, parameter in state.model.named_parameters():
            if name.rsplit('.', 1)[-1] == 'logit_scale':
                values['logit_scale'] = parameter.detach().exp()
        on_device = torch.stack([whole(value).float().reshape(()) for value in values.values()])
        metrics = dict(zip(values, on_device.tolist()))
        self.weight_norm = metrics['weight_norm']
        logger.log_metrics(metrics, step=state.timestamp.batch.value - 1)

    def _warn_of_waits(self, wait: float) -> None:
        self._batches += 1
        if self._batches == 1:  # the workers had to start
            self._first_batch = time.monotonic()
            return
        self._waited += wait
        if self._batches == _WAITS and is_first():
            share = self._waited / (time.monotonic() - self._first_batch)
            if share > _WAITING_SHARE:
                warnings.warn(f'train_data.num_workers: training waits for data in {share:.0%} of its time; '
                              'more workers, smaller images or a faster disk help', stacklevel=2)


class TextMonitor(Callback):
    """Log the number of texts so far (``data/texts``), the number of texts longer than `max_length` tokens
    (``data/cut_texts``), and the number of pairs of equal texts in the step (``data/equal_pairs``)."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.texts = self.cut = 0

    def state_dict(self) -> dict[str, Any]:
        return {'texts': self.texts, 'cut': self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts, self.cut = state['texts'], state['cut']

    def after_dataloader(self, state: State, logger: Logger) -> None:
        batch = state.batch
        sides = text_sides(batch)
        cut = sum(int((batch[f'{side}cut'] > 0).sum()) for side in sides)
        counts = [cut, len(sides) * len(batch['index'])]
        if 'positive_text_id' in batch:
            counts.append(int((batch['query_text_id'] == batch['positive_text_id']).sum()))
        totals = state.device.tensor_to_device(torch.tensor(counts))
        dist.all_reduce(totals)
        cut, texts, *equal = totals.tolist()
        self.cut += cut
        self.texts += texts
        metrics = {'data/cut_texts': self.cut, 'data/texts': self.texts}
        if equal:
            metrics['data/equal_pairs'] = equal[0]
        logger.log_metrics(metrics)

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.cut and is_first():
            print(f'{self.cut} of {self.texts} texts were longer than '
                  f'text_encoder.max_length={self.max_length} tokens and were cut', flush=True)


class NonfiniteError(RuntimeError):
    """The loss or a weight is not finite; the message names the step and the samples."""


class StopAtNonfinite(Callback):
    """Raise a NonfiniteError on all ranks after a step with a non-finite loss or weight, before a checkpoint
    of the step is written.

    It names the samples of all ranks with features that are not finite or, without any, those of this rank.
    The `monitor` knows the norm of the weights.
    """

    def __init__(self, monitor: StepMonitor) -> None:
        self._monitor = monitor
        self._sample_ids: list[str] = []
        # Rows, and whether their features are finite.
        self._finite: list[tuple[torch.Tensor, torch.Tensor]] = []

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._sample_ids, self._finite = state.batch['sample_id'], []

    def before_backward(self, state: State, logger: Logger) -> None:
        outputs: Any = state.outputs
        if not isinstance(outputs, dict):
            return
        for name, value in outputs.items():
            if value.ndim == 2:
                rows = state.batch.get(f'{name}_row', torch.arange(len(value)))
                self._finite.append((rows, torch.isfinite(value.detach()).all(1)))

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value - 1
        loss = state.total_loss_dict['loss/train/total']
        if not math.isfinite(loss):
            bad: set[int] = set()
            for rows, finite in self._finite:
                bad.update(rows.cpu()[~finite.cpu()].tolist())
            gathered = dist.all_gather_object([self._sample_ids[row] for row in sorted(bad)])
            sample_ids = [*chain.from_iterable(gathered)]
            suspects = f'samples: {self._sample_ids}'
            if sample_ids:
                suspects = f'samples with features that are not finite: {sample_ids}'
            raise NonfiniteError(f'the loss of step {step} is {loss}; {suspects}')
        if not math.isfinite(self._monitor.weight_norm):
            raise NonfiniteError(f'step {step} made weights that are not finite, although its loss is '
                                 f'finite; samples: {self._sample_ids}')


class SaveBest(Callback):
    """Write the weights to `best.safetensors` when a metric reaches a new maximum, and log ``best/<metric>``.

    Checkpoints store the best value so far, and the file its own, since no checkpoint follows the evaluation
    at the end of a run.

    Args:
        metric: Name of an evaluation metric.
        dataloader_label: ``eval``, the evaluation on `eval_data`, or the name of a zero-shot set.
        folder: Output folder of the file.  None: the folder of the run.
    """

    def __init__(
        self, metric: str = 'retrieval_recall@10', dataloader_label: str = 'eval',
        folder: Optional[str] = None
    ) -> None:
        self.metric, self.dataloader_label = metric, dataloader_label
        self.metric_key = f'{dataloader_label}/{metric}'
        self.path = Path(folder or '.', BEST_FILE)
        self.best: Optional[float] = None
        self.in_file = -math.inf  # value of the weights in a file of this run

    def state_dict(self) -> dict[str, Any]:
        return {'best': self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the best value so far, unless its file has stayed on another machine."""
        if broadcast_from_rank0(self.path.is_file):
            self.best = state['best']
            metadata = broadcast_from_rank0(lambda: read_safetensors(self.path).metadata)
            self.in_file = float(metadata.get(self.metric_key, -math.inf))

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.dataloader_label != self.dataloader_label:
            return
        computed = float(state.eval_metrics[self.dataloader_label][self.metric].compute())
        # Ranks may differ in the last bit, and all of them have to save or none.
        value = broadcast_from_rank0(lambda: computed)
        if self.best is not None and value <= self.best:
            return
        self.best = value
        logger.log_metrics({f'best/{self.metric}': value})
        if value < self.in_file:
            return
        weights: dict[str, Any] = get_model_state_dict(
            state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_first():
            write_safetensors(self.path, weights, {self.metric_key: str(value)})
        dist.barrier()


class ProgressBar(ProgressBarLogger):
    """Composer's progress bar, with support for log files and for runs that resume in the middle of an epoch.

    Checkpoints do not store its state: Composer 0.32.1 cannot read it back from a sharded checkpoint.
    """

    def __init__(self) -> None:
        super().__init__(stream=sys.stderr)
        self.hparams_already_logged_to_console = True  # Composer's do not describe the run

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, since no state is stored."""

    def eval_start(self, state: State, logger: Logger) -> None:
        super().eval_start(state, logger)
        if self.eval_pbar is not None:
            self._adapt_to_log_file(self.eval_pbar.pbar)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Print the metrics in a line of their own, since the bar is cut at the width of the terminal."""
        bar = self.eval_pbar
        super().eval_end(state, logger)
        if bar is not None:
            values = [f'{name.rpartition("/")[2]} {value}' for name, value in bar.metrics.items()]
            print(f'{state.dataloader_label}: {", ".join(values)}', file=sys.stderr, flush=True)

    def batch_start(self, state: State, logger: Logger) -> None:
        self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        begins = self.train_pbar is None
        super().epoch_start(state, logger)
        if begins and self.train_pbar is not None:
            bar = self.train_pbar.pbar
            self._adapt_to_log_file(bar)
            # Steps before the resumption are not steps of this process, and do not count in its rate.
            bar.initial = bar.n = int(getattr(state.timestamp, self.train_pbar.timestamp_key))
            bar.refresh()

    def _adapt_to_log_file(self, bar: Any) -> None:
        """Off a terminal, let metrics wait for the next line that is due, since Composer writes a line for
        each, and never move the cursor up."""
        if not sys.stderr.isatty():
            bar.set_postfix = partial(bar.set_postfix, refresh=False)
            bar.moveto = lambda lines: bar.fp.write('\n' * lines)
