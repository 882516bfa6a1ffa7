# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A plan in words: what a run needs of GPUs, time, data and storage, and what will go wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Optional

from tqdm import tqdm

from llm2clip.config import PlanConfig
from llm2clip.planning.datasets import DatasetPlan
from llm2clip.planning.hardware import GPU, GPUS
from llm2clip.planning.step import StepCost

__all__ = ['ExtractionPlan', 'Plan', 'TrainingPlan', 'readable']

_NO_DATA = 'no data is there: plan_samples=15e6 plans for 15 million samples'
# Bytes per second at which storage takes a checkpoint: a guess.
_TO_STORAGE = 1e9
_GIB = 2**30


@dataclass
class Plan:
    """A run before it is begun."""

    options: PlanConfig
    ranks: int
    half: bool = True
    """Whether matrix products are in 16 bits."""
    cost: Optional[StepCost] = None
    """Of what is repeated: a training step, or a forward pass."""
    repeats: Optional[float] = None
    """How often, on every GPU."""
    datasets: list[DatasetPlan] = field(default_factory=list)
    texts: int = 0
    """Captions or other texts that an LLM reads in the run."""
    tokens: int = 0
    """How many tokens they have."""
    problems: list[str] = field(default_factory=list)
    """What will stop the run."""
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        notes = [*(f'WILL FAIL: {text}' for text in self.problems), *(f'warning: {text}' for text in self.warnings)]
        return '\n'.join([*notes, *self.head(), *self._memory(), *self._gpus(), *self.foot()])

    def head(self) -> list[str]:
        """What is run."""
        return []

    def foot(self) -> list[str]:
        """What else it takes."""
        return []

    def seconds(self, gpu: GPU) -> float:
        """Of one repeat."""
        assert self.cost is not None
        peak = gpu.bf16 if self.half else gpu.fp32
        return self.cost.flops / (peak * 1e12 * self.options.plan_mfu)

    def _memory(self) -> list[str]:
        if self.cost is None:
            return []
        rows = [(name, getattr(self.cost, name)) for name in (
            'parameters', 'optimizer', 'ema', 'teacher', 'copy', 'gradients', 'buckets', 'activations')]
        lines = [f'{"memory per GPU":<24}{"GiB":>16}']
        lines += [f'  {name:<22}{value / _GIB:>16.3f}' for name, value in rows if value]
        return [*lines, f'  {"peak":<22}{self.cost.peak / _GIB:>16.3f}']

    def _gpus(self) -> list[str]:
        if self.cost is None:
            return []
        again = f', of which recomputation {self.cost.recomputed / self.cost.flops:.0%}' if self.cost.recomputed else ''
        price = self.options.plan_price
        lines = [f'{self.cost.flops / 1e12:,.1f} TFLOP per GPU and {self.unit}{again}; computed at '
                 f'{self.options.plan_mfu:.0%} of its peak, and never waiting:',
                 f'  {"GPU":<8}{"GiB":>6}{"fits":>6}{"s/" + self.unit:>10}'
                 + (f'{"hours":>10}{"GPU-hours":>12}' if self.repeats else '')
                 + (f'{"price":>14}' if self.repeats and price else '')]
        for name, gpu in GPUS.items():
            fits = 'yes' if gpu.fits(self.cost.peak) else 'no'
            row = f'  {name:<8}{gpu.memory:>6.0f}{fits:>6}{self.seconds(gpu):>10.3f}'
            if self.repeats:
                hours = self.seconds(gpu) * self.repeats / 3600
                row += f'{hours:>10,.1f}{hours * self.ranks:>12,.0f}'
                row += f'{hours * self.ranks * price:>14,.0f}' if price else ''
            lines.append(row)
        return lines

    @property
    def unit(self) -> str:
        """What is repeated."""
        return 'step'

    def text_lines(self) -> list[str]:
        """What an LLM reads."""
        return [f'{self.texts:,} texts through the LLM, {self.tokens:,} tokens'] if self.texts else []


@dataclass
class TrainingPlan(Plan):
    """A training before it is begun."""

    global_batch: int = 0
    device_batch: int = 0
    microbatch: int = 0
    find_largest: Optional[Callable[[], int]] = None
    """Finds `largest` by trying more steps."""
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Part of the model -> trainable and frozen parameters."""
    steps: Optional[int] = None
    epoch_steps: int = 0
    drawn: int = 0
    """Samples per epoch."""
    seconds_per_sample: float = 0.0
    """Of one core, to make a sample ready."""
    num_workers: int = 0
    """Per rank."""
    shared_memory: int = 0
    """Most bytes of batches that workers hold in /dev/shm, per node."""
    start_seconds: float = 0.0
    """Until the first sample of an epoch is known."""
    start_memory: int = 0
    """Of the process of a node that draws the order."""
    checkpoints: Optional[int] = None
    """How many checkpoints are written."""
    kept: int = -1
    sharded_checkpoints: bool = False
    groups: str = ''
    """The optimizer's groups."""
    measurable: bool = False
    """Whether model, optimizer and batch sizes go together, so that a step can be tried."""

    @cached_property
    def largest(self) -> Optional[int]:
        """Largest microbatch that fits the GPU of the options, 0 if none does; None where there is no choice."""
        return None if self.find_largest is None else self.find_largest()

    def head(self) -> list[str]:
        lines = [f'{self.ranks:,} GPU{"s" * (self.ranks > 1)}, {self.global_batch:,} samples per step'
                 + (f', {self.device_batch:,} per GPU in microbatches of {self.microbatch:,}'
                    if (self.ranks, self.microbatch) != (1, self.global_batch) else ''),
                 _NO_DATA if not self.drawn else f'{self.drawn:,} samples and {self.epoch_steps:,} steps per epoch'
                 + (f'; {self.steps:,} steps, {self.steps * self.global_batch:,} samples in all'
                    if self.steps is not None else ''), *self.text_lines()]
        rows = [*self.modules.items(), ('all', tuple(map(sum, zip(*self.modules.values()))))] if self.modules else []
        return lines + ([f'{"parameters":<24}{"trainable":>16}{"frozen":>16}',
                         *[f'  {name:<22}{trainable:>16,}{frozen:>16,}' for name, (trainable, frozen) in rows]]
                        if rows else [])

    def foot(self) -> list[str]:
        return [*self._fit(), *self._loading(), *self._data(), *self._storage(), self.groups]

    def _fit(self) -> list[str]:
        if self.largest is None:
            return []
        return [f'the largest microbatch that fits one {self.options.plan_gpu} is {self.largest:,}' if self.largest
                else f'no microbatch fits one {self.options.plan_gpu}']

    def _loading(self) -> list[str]:
        if self.cost is None or not self.seconds_per_sample:
            return []
        rate = self.device_batch / self.seconds(GPUS[self.options.plan_gpu])
        cores = rate * self.seconds_per_sample
        return [f'an {self.options.plan_gpu} takes {rate:,.0f} samples/s, and so {cores:,.1f} cores per GPU at '
                f'{1000 * self.seconds_per_sample:.1f} ms per sample of 640 × 480 pixels on a core of this machine; '
                f'train_data.num_workers is {self.num_workers}',
                f'workers hold at most {readable(self.shared_memory)} per node in /dev/shm']

    def _data(self) -> list[str]:
        lines = []
        for data in self.datasets:
            captions = ', '.join(f'{name} {share:.0%}' for name, share in data.captions.items())
            sidecars = ''.join(f', sidecar {name} {readable(size)}' for name, size in data.sidecars.items())
            lines.append(f'{data.name}: {data.samples:,} samples in {data.shards:,} shards, {data.drawn:,} per epoch '
                         f'({captions}); '
                         f'{readable(data.size)}{sidecars}')
        if self.datasets:
            lines.append(f'an epoch begins after about {self.start_seconds:.0f} s, for which a process per node takes '
                         f'{readable(self.start_memory)}')
        return lines

    def _storage(self) -> list[str]:
        if self.cost is None:
            return []
        size = self.cost.checkpoint
        by_rank = size / self.ranks if self.sharded_checkpoints else size
        written = '' if self.checkpoints is None else f', {self.checkpoints:,} are written'
        kept = f', {self.kept} kept' if self.kept > 0 else ', all kept'
        where = 'on every rank' if self.sharded_checkpoints and self.ranks > 1 else 'on the first rank'
        return [f'a checkpoint is {readable(size)}{written}{kept}; training waits {by_rank / _TO_STORAGE:.1f} s '
                f'while it is written at {_TO_STORAGE / 1e9:.0f} GB/s, {readable(int(by_rank))} {where}']


@dataclass
class ExtractionPlan(Plan):
    """An extraction before it is begun."""

    sidecars: dict[str, int] = field(default_factory=dict)
    """Dataset -> bytes of its vectors."""

    @property
    def unit(self) -> str:
        return 'pass'

    def head(self) -> list[str]:
        return [f'{self.ranks:,} GPU{"s" * (self.ranks > 1)}', *(self.text_lines() or [_NO_DATA])]

    def foot(self) -> list[str]:
        return [f'{name}: {readable(size)} of vectors' for name, size in self.sidecars.items()]


def readable(n: int) -> str:
    """Bytes with a unit."""
    return tqdm.format_sizeof(n, 'B')
