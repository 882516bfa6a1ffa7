# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text of a plan: errors and warnings, and the GPUs, time, data and storage that a run needs."""

from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from tqdm import tqdm

from llm2clip.config import PlanConfig
from llm2clip.planning.step import StepCost

_GIB = 2**30
# Share of memory for tensors, beside CUDA's context, NCCL's buffers and fragmentation.
_USABLE = 0.9


class GPU(NamedTuple):
    """Memory of a GPU in GiB, as torch sees it, and dense peaks in TFLOP/s: in 16 bits, and in float32 without TF32."""

    memory: float
    bf16: float
    fp32: float

    def fits(self, peak: int) -> bool:
        """Whether `peak` bytes are at most nine tenths of the memory."""
        return peak <= _USABLE * self.memory * _GIB


# NVIDIA's data sheets, SXM boards: A100 80GB, H100, H200, B200 (HGX).
GPUS = {'A100': GPU(79, 312, 19.5), 'H100': GPU(79, 989, 67), 'H200': GPU(139, 989, 67), 'B200': GPU(178, 2250, 75)}


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
    in_16_bits: bool = True  # whether matrix products are in 16 bits
    unit: str = 'step'  # a training step, or a forward pass (`pass`)
    errors: list[str] = field(default_factory=list)  # errors that will stop the run
    warnings: list[str] = field(default_factory=list)
    cost: Optional[StepCost] = None  # of one step or forward pass
    steps: Optional[float] = None  # steps or forward passes per GPU
    datasets: list[DatasetPlan] = field(default_factory=list)
    llm_embed_dim: int = 0  # width of the teachers' vectors, concatenated; 0 without any
    embed_dim: int = 0  # width of the targets of inheritance; 0 if unknown
    negative: bool = False  # whether any pair of captions has a hard negative
    characters: float = 0.0  # mean per drawn text; 0 if unknown
    texts: int = 0  # number of texts that an LLM reads in the run
    tokens: int = 0  # of all texts
    global_batch: int = 0
    device_batch: int = 0
    microbatch: int = 0
    epoch_samples: int = 0
    epoch_steps: int = 0
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)  # part -> trainable and frozen parameters
    shared_memory: int = 0  # maximum bytes of the workers' batches in /dev/shm, per node
    checkpoints: Optional[int] = None  # number of checkpoints written
    kept: int = -1
    vectors: dict[str, int] = field(default_factory=dict)  # dataset -> bytes of its extracted vectors

    def seconds(self, gpu: GPU) -> float:
        """Seconds of one step or forward pass."""
        assert self.cost is not None
        peak = gpu.bf16 if self.in_16_bits else gpu.fp32
        return self.cost.flops / (peak * 1e12 * self.options.plan_mfu)

    def __str__(self) -> str:
        lines = [*(f'WILL FAIL: {text}' for text in self.errors), *(f'warning: {text}' for text in self.warnings)]
        parts = (f', {self.device_batch:,} per GPU in microbatches of {self.microbatch:,}'
                 if (self.ranks, self.microbatch) != (1, self.global_batch) else '')
        lines.append(f'{self.ranks:,} GPU{"s" * (self.ranks > 1)}'
                     + (f', {self.global_batch:,} samples per step{parts}' if self.global_batch else ''))
        if not self.epoch_samples:
            lines.append('no data is there: plan_samples=15e6 plans for 15 million samples')
        elif self.global_batch:
            lines.append(f'{self.epoch_samples:,} samples and {self.epoch_steps:,} steps per epoch' + (
                '' if self.steps is None else
                f'; {self.steps:,} steps, {self.steps * self.global_batch:,} samples in all'))
        if self.texts:
            lines.append(f'{self.texts:,} texts through the LLM, {self.tokens:,} tokens')
        if self.modules:
            total = sum(trainable for trainable, _ in self.modules.values()), sum(n for _, n in self.modules.values())
            lines.append(f'{"parameters":<24}{"trainable":>16}{"frozen":>16}')
            lines += [f'  {name:<22}{trainable:>16,}{frozen:>16,}'
                      for name, (trainable, frozen) in {**self.modules, 'all': total}.items()]
        if self.cost is not None:
            rows = [(name, getattr(self.cost, name)) for name in (
                'parameters', 'optimizer', 'ema', 'teacher', 'copy', 'gradients', 'buckets', 'activations', 'peak')]
            lines.append(f'{"memory per GPU":<24}{"GiB":>16}')
            lines += [f'  {name:<22}{size / _GIB:>16.3f}' for name, size in rows if size]
            lines += self._gpus(self.cost)
        if self.shared_memory:
            lines.append(f'workers hold at most {_bytes(self.shared_memory)} per node in /dev/shm')
        for data in self.datasets:
            vectors = f' and {_bytes(data.embeddings)} of embeddings' if data.embeddings else ''
            epoch = f', {data.epoch_samples:,} per epoch' if self.global_batch else ''
            lines.append(f'{data.name}: {data.samples:,} samples in {data.shards:,} shards{epoch}; '
                         f'{_bytes(data.size)}{vectors}')
        if self.cost is not None and self.global_batch:
            written = '' if self.checkpoints is None else f', {self.checkpoints:,} are written'
            lines.append(f'a checkpoint is {_bytes(self.cost.checkpoint)}{written}, '
                         + (f'{self.kept} kept' if self.kept > 0 else 'all kept'))
        lines += [f'{name}: {_bytes(size)} of vectors' for name, size in self.vectors.items()]
        return '\n'.join(lines)

    def _gpus(self, cost: StepCost) -> list[str]:
        price = self.options.plan_price if self.steps else None
        again = f', of which recomputation {cost.recomputed / cost.flops:.0%}' if cost.recomputed else ''
        lines = [f'{cost.flops / 1e12:,.1f} TFLOP per GPU and {self.unit}{again}; computed at '
                 f'{self.options.plan_mfu:.0%} of its peak, and never waiting:',
                 f'  {"GPU":<8}{"GiB":>6}{"fits":>6}{"s/" + self.unit:>10}'
                 + (f'{"hours":>10}{"GPU-hours":>12}' if self.steps else '') + (f'{"price":>14}' if price else '')]
        for name, gpu in GPUS.items():
            row = f'  {name:<8}{gpu.memory:>6.0f}{"yes" if gpu.fits(cost.peak) else "no":>6}{self.seconds(gpu):>10.3f}'
            if self.steps:
                hours = self.seconds(gpu) * self.steps / 3600
                row += f'{hours:>10,.1f}{hours * self.ranks:>12,.0f}'
                row += f'{hours * self.ranks * price:>14,.0f}' if price else ''
            lines.append(row)
        return lines


def _bytes(n: int) -> str:
    return tqdm.format_sizeof(n, 'B')
