# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text of a plan: errors and warnings, and the GPUs, time, data and storage that a run needs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Optional

import numpy as np
from tqdm import tqdm

from llm2clip.config import PlanConfig
from llm2clip.planning.dry_run import StepCost
from llm2clip.planning.roofline import GPU, GPUS

_GIB = 2**30
_bytes = partial(tqdm.format_sizeof, suffix='B')


@dataclass
class DatasetPlan:
    """One dataset of a run; sizes are uncompressed, in bytes."""

    name: str
    samples: int = 0
    shards: int = 0
    size: int = 0
    embeddings: int = 0  # size of the teachers' vectors
    largest_shard: int = 0  # size, vectors included
    epoch_samples: int = 0
    texts: int = 0  # captions of all samples, missing ones included
    characters: float = 0.0  # mean per text; 0 if no shard is on disk


@dataclass
class Plan:
    """Plan of a training or an extraction; fields that are unknown or do not apply keep their defaults."""

    options: PlanConfig
    ranks: int
    unit: str = 'step'  # a training step, or a forward pass (`pass`)
    errors: list[str] = field(default_factory=list)  # errors that will stop the run
    warnings: list[str] = field(default_factory=list)
    cost: StepCost = field(default_factory=StepCost)  # of one step or forward pass
    steps: Optional[float] = None  # steps or forward passes per GPU
    datasets: list[DatasetPlan] = field(default_factory=list)
    llm_embed_dim: int = 0  # width of the teachers' vectors, concatenated; 0 without any
    embed_dim: int = 0  # width of the targets of inheritance; 0 if unknown
    characters: float = 0.0  # mean per drawn text; 0 if unknown
    images: int = 0  # that a frozen tower reads, or whose captions an LLM reads if `plan_samples` is set
    captions: float = 0.0  # of each of the latter
    texts: int = 0  # number of texts that an LLM reads in the run
    tokens: int = 0  # of all texts
    global_batch: int = 0
    device_batch: int = 0
    microbatch: int = 0
    epoch_samples: int = 0
    epoch_steps: int = 0
    # Part of the model -> trainable and frozen parameters.
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared_memory: int = 0  # maximum bytes of the workers' batches in /dev/shm, per node
    checkpoints: Optional[int] = None  # number of checkpoints written
    kept: int = -1
    vectors: dict[str, int] = field(default_factory=dict)  # dataset -> bytes of its extracted vectors
    teacher: int = 0  # bytes of the LLM that stage 1 writes at the end

    @property
    def disk(self) -> int:
        """Bytes that the run leaves on disk."""
        written = 1 if self.checkpoints is None else self.checkpoints
        checkpoints = min(written, self.kept) if self.kept > 0 else written
        return self.teacher + sum(self.vectors.values()) + self.cost.checkpoint * checkpoints

    def hours(self, gpu: GPU) -> float:
        """Hours of the whole run; NaN if the number of steps is not known."""
        return self.seconds(gpu) * (self.steps or math.nan) / 3600

    def seconds(self, gpu: GPU) -> float:
        """Seconds of one step or forward pass: by the roofline, or at `plan_mfu` of the peak."""
        if self.options.plan_mfu is not None:
            return self.peak_seconds(gpu) / self.options.plan_mfu
        busy, _ = gpu.busy(self.cost.kernels)
        return max(busy, self.cost.received / (gpu.reached_bandwidth * gpu.link * 1e12))

    def peak_seconds(self, gpu: GPU) -> float:
        """Seconds of the FLOPs alone, at the GPU's peak."""
        kernels = self.cost.kernels.items()
        return sum(times * kernel.flops / gpu.flop_rate(kernel) for kernel, times in kernels)

    def __str__(self) -> str:
        lines = [f'WILL FAIL: {error}' for error in self.errors]
        lines += [f'warning: {warning}' for warning in self.warnings]
        lines += self._schedule()
        if self.modules:
            lines.append(f'{"parameters":<24}{"trainable":>16}{"frozen":>16}')
            total = tuple(map(sum, zip(*self.modules.values())))
            for name, (trainable, frozen) in [*self.modules.items(), ('all', total)]:
                lines.append(f'  {name:<22}{trainable:>16,}{frozen:>16,}')
        if self.cost.peak:
            lines += self._memory()
            lines += self._gpus()
        if self.shared_memory:
            lines.append(f'workers hold at most {_bytes(self.shared_memory)} per node in /dev/shm')
        lines += self._files()
        return '\n'.join(lines)

    def _files(self) -> list[str]:
        """Datasets that the run reads, and what it writes."""
        lines: list[str] = []
        for dataset in self.datasets:
            line = f'{dataset.name}: {dataset.samples:,} samples in {dataset.shards:,} shards'
            if self.global_batch:
                line += f', {dataset.epoch_samples:,} per epoch'
            if self.global_batch and self.steps and self.epoch_steps:
                epochs = self.steps / self.epoch_steps
                line += f', {epochs * dataset.epoch_samples / dataset.samples:.3g} epochs of it in all'
            line += f'; {_bytes(dataset.size)}'
            if dataset.embeddings:
                line += f' and {_bytes(dataset.embeddings)} of embeddings'
            lines.append(line)
        if self.cost.checkpoint:
            line = f'a checkpoint is {_bytes(self.cost.checkpoint)}'
            if self.checkpoints is not None:
                line += f', {self.checkpoints:,} are written'
            kept = 'all'
            if self.kept > 0:
                kept = f'{self.kept}'
            lines.append(f'{line}, {kept} kept')
        if self.teacher:
            lines.append(f'the teacher is {_bytes(self.teacher)}')
        for name, size in self.vectors.items():
            lines.append(f'{name}: {_bytes(size)} of vectors')
        return lines

    def _schedule(self) -> list[str]:
        """GPUs, samples per step, steps and texts."""
        gpus = f'{self.ranks:,} GPU'
        if self.ranks > 1:
            gpus += 's'
        if self.global_batch:
            gpus += (f', {self.global_batch:,} samples per step, {self.device_batch:,} per GPU '
                     f'in microbatches of {self.microbatch:,}')
        lines = [gpus]
        if not self.epoch_samples:
            lines.append('no data is there: plan_samples=15e6 plans for 15 million samples')
        elif self.global_batch:
            epoch = f'{self.epoch_samples:,} samples and {self.epoch_steps:,} steps per epoch'
            if self.steps is not None:
                epoch += f'; {self.steps:,} steps, {self.steps * self.global_batch:,} samples in all'
            lines.append(epoch)
        if self.captions:
            lines.append(f'{self.images:,} images with {self.captions:.3g} captions each')
        elif self.images:
            lines.append(f'{self.images:,} images through the tower')
        if self.texts:
            lines.append(f'{self.texts:,} texts through the LLM, {self.tokens:,} tokens')
        return lines

    def _memory(self) -> list[str]:
        """Table of the memory of a GPU."""
        lines = [f'{"memory per GPU":<24}{"GiB":>16}']
        for name in ('parameters', 'optimizer', 'teacher', 'copy', 'gradients', 'buckets',
                     'activations', 'peak'):
            size = getattr(self.cost, name)
            if size:
                lines.append(f'  {name:<22}{size / _GIB:>16.3f}')
        return lines

    def _gpus(self) -> list[str]:
        """Table of the time, the fraction of the peak, the share of the time in which memory is the limit,
        and, if they are known, hours and price on each kind of GPU."""
        work = f'{self.cost.flops / 1e12:,.1f} TFLOP per GPU and {self.unit}'
        if self.cost.recomputed:
            work += f', of which recomputation {self.cost.recomputed / self.cost.flops:.0%}'
        moved = sum(times * kernel.size for kernel, times in self.cost.kernels.items())
        work += f'; {_bytes(moved)} moved in memory'
        if self.cost.received:
            work += f', {_bytes(self.cost.received)} received'
        price = self.options.plan_price or 0
        known = 1
        if self.steps:
            known = 3 if price else 2
        titles = [f'  {"GPU":<8}{"GiB":>6}{"fits":>6}{"s/" + self.unit:>10}{"of peak":>9}{"memory":>8}',
                  f'{"hours":>10}{"GPU-hours":>12}', f'{"price":>14}']
        lines = [work, ''.join(titles[:known])]
        for name, gpu in GPUS.items():
            fits = 'yes' if gpu.fits(self.cost.peak) else 'no'
            gpu_hours = self.hours(gpu) * self.ranks
            seconds = self.seconds(gpu)
            busy, memory_bound = gpu.busy(self.cost.kernels)
            shares = f'{self.peak_seconds(gpu) / seconds:>9.0%}{memory_bound / busy:>8.0%}'
            cells = [f'  {name:<8}{gpu.memory:>6.0f}{fits:>6}{seconds:>10.3f}{shares}',
                     f'{self.hours(gpu):>10,.1f}{gpu_hours:>12,.0f}', f'{gpu_hours * price:>14,.0f}']
            lines.append(''.join(cells[:known]))
        return lines


def sum_of(plans: Mapping[str, Plan]) -> str:
    """Return a table of several runs, one after another: memory, disk and hours of each, and of all: the
    largest memory, and the sums of the others.

    A dash stands for a GPU whose memory is too small, or for an unknown number of steps.
    """
    first, *_ = plans.values()
    lines = [f'{"":<16}{"GiB":>6}{"disk":>9}' + ''.join(f'{name:>8}' for name in GPUS)]
    hours = np.zeros(len(GPUS))
    for step, plan in plans.items():
        row = f'{step:<16}{plan.cost.peak / _GIB:>6.0f}{_bytes(plan.disk):>9}'
        step_hours = [plan.hours(gpu) if gpu.fits(plan.cost.peak) else math.nan for gpu in GPUS.values()]
        lines.append(f'{row}{_cells(step_hours, 1)} hours')
        hours += step_hours
    disk = _bytes(sum(plan.disk for plan in plans.values()))
    peak = max(plan.cost.peak for plan in plans.values())
    lines.append(f'{"all":<16}{peak / _GIB:>6.0f}{disk:>9}{_cells(hours, 1)} hours')
    factors = {'GPU-hours': first.ranks, 'price': first.ranks * (first.options.plan_price or 0)}
    for unit, factor in factors.items():
        if factor:
            lines.append(' ' * 31 + _cells(factor * hours, 0) + f' {unit}')
    return '\n'.join(lines)


def _cells(values: Iterable[float], digits: int) -> str:
    """Return numbers as cells of a table, and a dash for NaN."""
    return ''.join(f'{"-":>8}' if math.isnan(value) else f'{value:>8,.{digits}f}' for value in values)
