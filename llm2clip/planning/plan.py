# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a training will cost and what will go wrong, from its configuration and the datasets' indexes alone."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.core import Time, TimeUnit
from composer.models import ComposerModel
from composer.utils import dist
from streaming.base.util import bytes_to_int
from tqdm import tqdm

from llm2clip.config import ConfigError, LoaderConfig, Stage1Config, Stage2Config, TrainConfig
from llm2clip.data.caption_pairs import pairs_of_streams
from llm2clip.data.masked_texts import texts_of_streams
from llm2clip.data.schema import caption_column
from llm2clip.imports.initial import check_initial_weights
from llm2clip.models.mntp import MaskedNextTokenPrediction
from llm2clip.planning.datasets import DataPlan, DatasetPlan, plan_images, plan_texts
from llm2clip.planning.memory import Memory, StepPlan, step_memory
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder
from llm2clip.stages import stage1, stage2
from llm2clip.teacher.folder import teacher_config
from llm2clip.teacher.llm import load_llm
from llm2clip.training.trainer import build_optimizer, check_metrics, check_train_config

__all__ = ['Plan', 'plan_run', 'plan_stage1', 'plan_stage2']

_UNKNOWN_DIM = 4096


@dataclass
class Plan:
    """A training before it is run."""

    ranks: int
    global_batch: int
    device_batch: int
    microbatch: int
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Part of the model -> trainable and frozen parameters."""
    memory: Optional[Memory] = None
    datasets: list[DatasetPlan] = field(default_factory=list)
    steps: Optional[int] = None
    epoch_steps: int = 0
    texts: int = 0
    """Captions or other texts that an LLM reads in the run."""
    tokens: int = 0
    """Most tokens that those can have."""
    checkpoint: int = 0
    """Bytes of one checkpoint."""
    checkpoints: Optional[int] = None
    """How many checkpoints are written."""
    kept: int = -1
    problems: list[str] = field(default_factory=list)
    """What will stop the run."""
    warnings: list[str] = field(default_factory=list)
    measurable: bool = True
    """Whether model, optimizer and batch sizes go together, so that a step can be tried."""

    def __str__(self) -> str:
        return '\n'.join([*self._step_lines(), *self._model_lines(), *self._memory_lines(), *self._data_lines(),
                          *self._storage_lines(), *[f'warning: {text}' for text in self.warnings],
                          *[f'WILL FAIL: {text}' for text in self.problems]])

    def _step_lines(self) -> list[str]:
        samples = sum(data.drawn for data in self.datasets)
        lines = [f'{self.ranks:,} GPU{"s" * (self.ranks > 1)}, {self.global_batch:,} samples per step'
                 + (f', {self.device_batch:,} per GPU in microbatches of {self.microbatch:,}'
                    if (self.ranks, self.microbatch) != (1, self.global_batch) else ''),
                 f'{samples:,} samples and {self.epoch_steps:,} steps per epoch'
                 + (f'; {self.steps:,} steps, {self.steps * self.global_batch:,} samples in all'
                    if self.steps is not None else '')]
        if self.texts:
            lines.append(f'{self.texts:,} texts through the LLM, at most {self.tokens:,} tokens')
        return lines

    def _model_lines(self) -> list[str]:
        rows = [*self.modules.items(), ('all', tuple(map(sum, zip(*self.modules.values()))))] if self.modules else []
        return [f'{"parameters":<24}{"trainable":>16}{"frozen":>16}',
                *[f'  {name:<22}{trainable:>16,}{frozen:>16,}' for name, (trainable, frozen) in rows]] if rows else []

    def _memory_lines(self) -> list[str]:
        if self.memory is None:
            return []
        values = dataclasses.asdict(self.memory)
        lines = [f'{"memory per GPU":<24}{"GiB":>16}']
        lines += [f'  {name:<22}{value / 2**30:>16.3f}' for name, value in values.items()
                  if value and name not in ('peak', 'optimizer_whole')]
        return [*lines, f'  {"peak, not their sum":<22}{values["peak"] / 2**30:>16.3f}']

    def _data_lines(self) -> list[str]:
        lines = []
        for data in self.datasets:
            captions = ', '.join(f'{name} {share:.0%}' for name, share in data.captions.items())
            sidecars = ''.join(f', sidecar {name} {_size(size)}' for name, size in data.sidecars.items())
            lines.append(f'{data.name}: {data.samples:,} samples, {data.drawn:,} per epoch ({captions}); '
                         f'{_size(data.size)}{sidecars}')
        return lines

    def _storage_lines(self) -> list[str]:
        if not self.checkpoint:
            return []
        written = '' if self.checkpoints is None else f', {self.checkpoints:,} are written'
        kept = f', {self.kept} kept' if self.kept > 0 else ', all kept'
        return [f'a checkpoint is {_size(self.checkpoint)}{written}{kept}']


def plan_run(config: TrainConfig, plan: Callable[[Any], Plan]) -> None:
    """Print the plan, on one process.

    Raises:
        SystemExit: With 1, something will stop the run.
    """
    if dist.get_global_rank() > 0:
        return
    # What asks for the number of ranks before they are connected looks here, as Composer's launcher sets it.
    os.environ['WORLD_SIZE'] = str(config.plan_ranks or dist.get_world_size())
    result = plan(config)
    print(result, flush=True)
    if result.problems:
        raise SystemExit(1)


def plan_stage2(config: Stage2Config) -> Plan:
    """What stage 2 would need, and what would stop it."""
    data = plan_images(config.train_data, 'train_data', config.online.enabled)
    if config.eval_data is not None:
        data.problems += plan_images(config.eval_data, 'eval_data', config.online.enabled).problems
    plan = _begin(config, config.train_data, data)
    llm = None
    if config.teacher is not None and Path(config.teacher).is_dir():
        llm = load_llm(teacher_config(config.teacher), on_meta=True)
    elif config.online.enabled:
        plan.problems.append(f'teacher: online.enabled needs a teacher, and there is none in {config.teacher}')
    dim = data.llm_embed_dim or (llm.config.hidden_size if llm else 0)
    if not dim:
        plan.warnings.append(f'the width of the teacher\'s vectors is not known, {_UNKNOWN_DIM} is assumed')
        dim = _UNKNOWN_DIM
    with torch.device('meta'):
        model = stage2.make_model(config, dim, load_weights=False)
    size = model.model.vision_encoder.preprocessing.image_size
    if config.initial_weights is not None:
        try:
            check_initial_weights(model.model, config.model, config.initial_weights)
        except ConfigError as error:
            plan.problems.append(str(error))

    def batch(n: int) -> dict[str, torch.Tensor]:
        return {'pixel_values': torch.empty(n, 3, size, size), 'text_embedding': torch.empty(n, dim),
                **{name: torch.zeros(n, dtype=torch.long) for name in ('index', 'text_id', 'sample_seed')}}

    in_the_loop = config.online.enabled and llm is not None
    if in_the_loop and plan.steps is not None:
        plan.texts = plan.steps * config.global_train_batch_size
        plan.tokens = plan.texts * teacher_config(str(config.teacher)).max_length
    split = plan.ranks if config.online.sharded else 1
    teacher = sum(p.numel() * p.element_size() for p in llm.parameters()) // split if in_the_loop and llm else 0
    _measure(plan, config, model, model.model, batch, teacher)
    memory = plan.memory
    if memory and config.loss.block_size is None and memory.logits > memory.peak / 4:
        plan.warnings.append(f'the logits of {plan.global_batch:,} samples take {memory.logits / 2**30:.1f} GiB on '
                             'every GPU; loss.block_size keeps them small')
    return plan


def plan_stage1(config: Stage1Config) -> Plan:
    """What stage 1 would need, and what would stop it."""
    mntp, pairs = config.objective == 'mntp', []
    if mntp:
        mixes = texts_of_streams(config.train_data, 'train_data')
        columns = [[caption_column(key) for key in mix] for mix in mixes]
    else:
        pairs, columns = pairs_of_streams(config.train_data, True, 'train_data')
        mixes = [{f'{"|".join(pair.query)} → {"|".join(pair.positive)}': pair.weight for pair in of_stream}
                 for of_stream in pairs]
    data = plan_texts(config.train_data, mixes, columns, 'train_data')
    if config.eval_data is not None and not mntp:
        eval_columns = pairs_of_streams(config.eval_data, False, 'eval_data')[1]
        data.problems += plan_texts(config.eval_data, [{}] * len(eval_columns), eval_columns, 'eval_data').problems
    plan = _begin(config, config.train_data, data, per_stream=not mntp)
    negative = any(pair.negative for of_stream in pairs for pair in of_stream)
    sides = [''] if mntp else ['query_', 'positive_', *(['negative_'] if negative else [])]
    length = config.text_encoder.max_length
    with torch.device('meta'):
        model = stage1.make_model(config, on_meta=True)
    if isinstance(model, MaskedNextTokenPrediction):
        model = _WithoutMask(model.text_encoder, model.head, config.mntp.mask_probability)

    def batch(n: int) -> dict[str, torch.Tensor]:
        result = {'index': torch.zeros(n, dtype=torch.long)}
        for side in sides:
            result[f'{side}text_id'] = torch.zeros(n, dtype=torch.long)
            for name in ('input_ids', 'attention_mask', 'embed_mask'):
                result[side + name] = torch.ones(n, length, dtype=torch.long)
        return result

    if plan.steps is not None:
        plan.texts = plan.steps * config.global_train_batch_size * len(sides)
        plan.tokens = plan.texts * length
    plan.warnings.append(f'memory is that of texts as long as text_encoder.max_length, {length} tokens')
    _measure(plan, config, model, model, batch)
    return plan


class _WithoutMask(MaskedNextTokenPrediction):
    """With as many masked tokens as there are on average: which ones they are does not change the memory."""

    def __init__(self, text_encoder: TextEncoder, head: nn.Linear, probability: float) -> None:
        super().__init__(text_encoder, head)
        self.probability = probability

    def loss(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor], *args: Any) -> torch.Tensor:
        states = outputs.flatten(0, 1)[:int(outputs.shape[0] * outputs.shape[1] * self.probability)]
        return F.cross_entropy(self.head(states).float(), torch.zeros(len(states), dtype=torch.long))


def _begin(config: TrainConfig, loader: LoaderConfig, data: DataPlan, per_stream: bool = False) -> Plan:
    """Steps and data; and whether the names, arguments and sizes of the configuration go together."""
    ranks, batch = dist.get_world_size(), config.global_train_batch_size
    device_batch = batch // ranks
    plan = Plan(ranks, batch, device_batch, config.device_train_microbatch_size or device_batch, datasets=data.datasets,
                problems=data.problems, kept=config.save_num_checkpoints_to_keep)
    try:
        check_train_config(config)
    except ConfigError as error:
        plan.problems.append(str(error))
        plan.measurable = False
    drawn = sum(dataset.drawn for dataset in data.datasets)
    if per_stream:
        plan.epoch_steps = sum(dataset.drawn // batch for dataset in data.datasets)
    else:
        plan.epoch_steps = -(-drawn // ranks) // max(1, device_batch)
    plan.steps = _steps(config.max_duration, plan)
    if data.datasets and not plan.epoch_steps:
        plan.problems.append(f'train_data: an epoch has {drawn:,} samples, fewer than one global batch of {batch:,}')
    elif (rest := drawn - plan.epoch_steps * batch) > 0:
        plan.warnings.append(f'{rest:,} samples of an epoch fill no batch; which ones changes every epoch')
    _check_cache(plan, loader)
    return plan


def _steps(duration: str, plan: Plan) -> Optional[int]:
    time = Time.from_timestring(duration)
    if time.unit == TimeUnit.BATCH:
        return int(time.value)
    if time.unit == TimeUnit.EPOCH:
        return int(time.value) * plan.epoch_steps
    return -(-int(time.value) // plan.global_batch) if time.unit == TimeUnit.SAMPLE else None


def _check_cache(plan: Plan, data: LoaderConfig) -> None:
    if data.cache_limit is None or not plan.datasets:
        return
    limit, largest = bytes_to_int(data.cache_limit), max(dataset.largest_shard for dataset in plan.datasets)
    whole = sum(dataset.size + sum(dataset.sidecars.values()) for dataset in plan.datasets)
    if limit < 4 * largest:
        plan.problems.append(f'train_data.cache_limit: {data.cache_limit} is less than four shards, '
                             f'{_size(4 * largest)}')
    elif limit < whole:
        plan.warnings.append(f'train_data.cache_limit: {data.cache_limit} holds {limit / whole:.0%} of the data; the '
                             'rest is downloaded again every epoch')


def _measure(
    plan: Plan, config: Union[Stage1Config, Stage2Config], model: ComposerModel, parts: nn.Module,
    make_batch: Callable[[int], dict[str, torch.Tensor]], teacher: int = 0,
) -> None:
    """Parameters, memory and checkpoints."""
    plan.modules = _modules(parts)
    try:
        check_metrics(config, model)
    except ConfigError as error:
        plan.problems.append(str(error))
    if not plan.measurable:
        return
    contrastive = not isinstance(config, Stage1Config) or config.objective == 'contrastive'
    recomputed = config.fsdp is not None and config.fsdp.activation_checkpointing
    precision = config.precision or ('fp32' if config.device == 'cpu' else 'amp_fp16')
    step = StepPlan(plan.ranks, plan.device_batch, plan.microbatch, contrastive, precision.startswith('amp'),
                    config.fsdp is not None, recomputed, 'ema' in config.algorithms, teacher)
    saved = model.state_dict()  # of stage 1, only what is trained
    weights = sum(value.numel() * value.element_size() for value in saved.values())
    memory = step_memory(model, partial(build_optimizer, config), make_batch, step)
    plan.memory = memory
    plan.checkpoint = weights + memory.optimizer_whole
    interval = _steps(config.save_interval, plan)
    plan.checkpoints = -(-plan.steps // interval) if interval and plan.steps is not None else None
    if torch.cuda.is_available() and memory.peak > (there := torch.cuda.get_device_properties(0).total_memory):
        plan.warnings.append(f'{memory.peak / 2**30:.1f} GiB are more than the {there / 2**30:.1f} GiB of this GPU')


def _modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters per child, each counted once; LoRA weights apart from the LLM they adapt."""
    result: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = 'lora' if 'lora_' in name else name.split('.')[0]
        trainable, frozen = result.get(part, (0, 0))
        n = parameter.numel()
        result[part] = (trainable + n, frozen) if parameter.requires_grad else (trainable, frozen + n)
    return result


def _size(n: int) -> str:
    return tqdm.format_sizeof(n, 'B')
