# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a run will need and what will go wrong, from its configuration and the datasets' indexes alone."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from composer.core import Precision, Time, TimeUnit
from composer.models import ComposerModel
from composer.utils import dist
from streaming.base.util import bytes_to_int

from llm2clip.config import (
    ConfigError,
    ExtractConfig,
    InheritanceConfig,
    LoaderConfig,
    PlanConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
)
from llm2clip.data.caption_pairs import with_two_captions
from llm2clip.data.shared_memory import shared_memory
from llm2clip.imports.initial import check_initial_weights
from llm2clip.models.inheritance import ComposerInheritance
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.models.mntp import MaskedNextTokenPrediction
from llm2clip.planning.datasets import DataPlan, DatasetPlan, plan_images, plan_sources, plan_targets, plan_texts
from llm2clip.planning.encoders import (
    count_tokens,
    described,
    extracting_encoder,
    on_meta,
    online_teacher,
    teacher_encoder,
    trained_texts,
)
from llm2clip.planning.hardware import GPU, GPUS
from llm2clip.planning.loading import image_batch, seconds_per_image, target_batch, text_batch
from llm2clip.planning.pretended import pretended_ranks
from llm2clip.planning.recomputation import settle_recomputation
from llm2clip.planning.step import MeanMask, OnlinePlan, StepCost, StepPlan, rehearse_encoder, rehearse_step
from llm2clip.planning.summary import ExtractionPlan, Plan, TrainingPlan, readable
from llm2clip.remote_code.checks_llm2clip import load_config
from llm2clip.training import inheritance, stage1, stage2
from llm2clip.training.optim import describe_groups
from llm2clip.training.trainer import build_optimizer, check_metrics, check_train_config

__all__ = ['plan_extraction', 'plan_inheritance', 'plan_run', 'plan_stage1', 'plan_stage2']

_UNKNOWN_DIM, _UNKNOWN_EMBED_DIM = 4096, 768
_GPUS_PER_NODE = 8
# What Streaming takes per sample to draw the order of an epoch, with 3 to 100 million on a core of an Intel Xeon.
_ORDER_SECONDS, _ORDER_BYTES = 240e-9, 48


def plan_run(config: PlanConfig, plan: Callable[[Any], Plan]) -> None:
    """Print the plan.

    Raises:
        SystemExit: With 1, something will stop the run.
    """
    with pretended_ranks(config.plan_ranks or dist.get_world_size()):
        settled, said, planned = settle_recomputation(config, plan, GPUS[config.plan_gpu])
        result = plan(settled) if planned is None else planned
    print(f'{said}\n{result}' if said else result, flush=True)
    if result.problems:
        raise SystemExit(1)


def plan_stage2(config: Stage2Config) -> Plan:
    """What stage 2 would need, and what would stop it."""
    if config.plan_samples is None:
        data = plan_images(config.train_data, 'train_data', not config.reads_vectors)
        if config.eval_data is not None:
            data.problems += plan_images(config.eval_data, 'eval_data', not config.reads_vectors).problems
    else:
        data = DataPlan()
    plan = _begin(config, config.train_data, data)
    online = online_teacher(config, plan, data)
    texts = trained_texts(config, plan, data)
    dim = (texts and texts.width) or _teacher_width(config, data, plan)
    image_size = stage2.train_image_size(config)

    def make_model(tokens: int = 0 if texts is None else texts.longest) -> ComposerLLM2CLIP:
        made = None if texts is None else texts.make(tokens)
        with torch.device('meta'):
            return stage2.make_model(config, dim, load_weights=False, texts=made)

    model = make_model()
    plan.modules = _modules(model)
    if config.initial_weights is not None:
        with _collected(plan):
            check_initial_weights(model.model, config.model, config.initial_weights)
    # A frozen LLM in the loop leaves vectors, too.
    frozen = config.reads_vectors or config.online.enabled
    vector = {'text_embedding': torch.empty(1, dim, dtype=torch.float16)} if frozen else {}
    captions = config.train_data.captions_per_image
    _measure(plan, config, stage2.possible_metrics(config), model, make_model,
             lambda n: image_batch(n, image_size, vector, captions, texts is not None), online=online,
             at_mean=partial(make_model, texts.tokens) if texts is not None and texts.longest else None)
    if plan.measurable:
        plan.seconds_per_sample = seconds_per_image(config.train_data, image_size)
        plan.num_workers = config.train_data.num_workers
        batch = image_batch(plan.device_batch, image_size, vector if config.reads_vectors else {}, captions)
        plan.shared_memory = shared_memory(batch, plan.num_workers, ranks=min(_GPUS_PER_NODE, plan.ranks),
                                           epoch_samples=plan.drawn)
    return plan


def plan_inheritance(config: InheritanceConfig) -> Plan:
    """What inheritance would need, and what would stop it."""
    data = DataPlan()
    if config.plan_samples is None:
        data = plan_targets(config.train_data, 'train_data')
        if config.eval_data is not None:
            data.problems += plan_targets(config.eval_data, 'eval_data').problems
    plan = _begin(config, config.train_data, data)
    dim = _teacher_width(config, data, plan)
    if not (embed_dim := data.embed_dim):
        embed_dim = _UNKNOWN_EMBED_DIM
        plan.warnings.append(f'the width of the targets is not known, {embed_dim} is assumed')

    def make_model() -> ComposerInheritance:
        with torch.device('meta'):
            return inheritance.make_model(config, dim, embed_dim)

    model = make_model()
    plan.modules = _modules(model)
    _measure(plan, config, inheritance.possible_metrics(config), model, make_model,
             lambda n: target_batch(n, dim, embed_dim))
    return plan


def _teacher_width(config: Union[InheritanceConfig, Stage2Config], data: DataPlan, plan: Plan) -> int:
    """Of a teacher's vectors, as its sidecars, its folder or `plan_llm` say, or a guess."""
    dim = data.llm_embed_dim
    if not dim and (encoder := teacher_encoder(config)) is not None:
        dim = load_config(encoder.pretrained, gguf_file=encoder.gguf_file).hidden_size
    if not dim:
        plan.warnings.append(f'the width of the teacher\'s vectors is not known, {_UNKNOWN_DIM} is assumed')
    return dim or _UNKNOWN_DIM


def plan_stage1(config: Stage1Config) -> Plan:
    """What stage 1 would need, and what would stop it."""
    config = dataclasses.replace(config, text_encoder=described(config.text_encoder, config.plan_llm))
    mntp = config.objective == 'mntp'
    data = DataPlan()
    streams = config.train_data.streams.values()
    negative = any(pair.has_negative for pairs in (config.train_data.pairs, *(stream.pairs for stream in streams))
                   for pair in pairs or [])
    if config.plan_samples is None:
        data, negative = plan_texts(config.train_data, 'train_data', mntp)
        if not mntp and config.eval_data and (evaluated := with_two_captions(config.eval_data, 'eval_data')):
            data.problems += plan_texts(evaluated, 'eval_data', mntp, train=False)[0].problems
    plan = _begin(config, config.train_data, data, per_stream=not mntp)
    sides = [''] if mntp else ['query_', 'positive_', *(['negative_'] if negative else [])]
    longest = config.text_encoder.max_length
    count_tokens(plan, config, data, (plan.steps or 0) * config.global_train_batch_size * len(sides), longest)

    def make_model() -> ComposerModel:
        with torch.device('meta'):
            model = stage1.make_model(config, on_meta=True)
        if isinstance(model, MaskedNextTokenPrediction):
            return MeanMask(model, config.mntp.mask_probability)
        return model

    model = make_model()
    plan.modules = _modules(model)
    plan.warnings.append(f'memory is that of texts as long as text_encoder.max_length, {longest} tokens')
    _measure(plan, config, stage1.possible_metrics(config), model, make_model,
             lambda n: text_batch(n, sides, longest), longest)
    return plan


def plan_extraction(config: ExtractConfig) -> Plan:
    """What an extraction would need, and what would stop it."""
    data = plan_sources(config.datasets, 'datasets') if config.plan_samples is None else DataPlan()
    plan = ExtractionPlan(config, dist.get_world_size(), config.precision != 'fp32', datasets=data.datasets,
                          problems=data.problems)
    with _collected(plan):
        encoder = extracting_encoder(config)
        texts = sum(dataset.texts for dataset in data.datasets) or int(config.plan_samples or 0)
        tokens = count_tokens(plan, config, data, texts, encoder.max_length)
        online = OnlinePlan(on_meta(encoder), tokens, config.batch_tokens, config.precision)
        plan.cost = rehearse_encoder(online)
        plan.repeats = texts / online.captions / plan.ranks
        dim = online.encoder.llm_embed_dim
        plan.sidecars = {dataset.name: dataset.texts * (2 * dim if config.storage == 'float16' else dim + 4)
                         for dataset in data.datasets or [DatasetPlan('all', texts=texts)]}
    return plan


def _begin(config: TrainConfig, loader: LoaderConfig, data: DataPlan, per_stream: bool = False) -> TrainingPlan:
    """Steps and data; and whether the names, arguments and sizes of the configuration go together."""
    ranks, batch = dist.get_world_size(), config.global_train_batch_size
    device_batch = batch // ranks
    plan = TrainingPlan(config, ranks, _precision(config) != Precision.FP32, datasets=data.datasets,
                        problems=data.problems, global_batch=batch, device_batch=device_batch,
                        microbatch=config.device_train_microbatch_size or device_batch,
                        kept=config.save_num_checkpoints_to_keep)
    with _collected(plan):
        check_train_config(config)
        plan.measurable = True
    plan.drawn = int(config.plan_samples or sum(dataset.drawn for dataset in data.datasets))
    if per_stream and data.datasets:
        plan.epoch_steps = sum(dataset.drawn // batch for dataset in data.datasets)
    else:
        plan.epoch_steps = -(-plan.drawn // ranks) // max(1, device_batch)
    plan.repeats = plan.steps = _steps(config.max_duration, plan)
    if plan.drawn and not plan.epoch_steps:
        plan.problems.append(f'train_data: an epoch has {plan.drawn:,} samples, fewer than one global batch of '
                             f'{batch:,}')
    elif (rest := plan.drawn - plan.epoch_steps * batch) > 0:
        plan.warnings.append(f'{rest:,} samples of an epoch fill no batch; which ones changes every epoch')
    plan.start_seconds, plan.start_memory = _ORDER_SECONDS * plan.drawn, _ORDER_BYTES * plan.drawn
    _check_cache(plan, loader)
    return plan


def _precision(config: TrainConfig) -> Precision:
    """What the run computes in, a GPU unless it says otherwise."""
    return Precision(config.precision or ('fp32' if config.device == 'cpu' else 'amp_fp16'))


def _steps(duration: str, plan: TrainingPlan) -> Optional[int]:
    time = Time.from_timestring(duration)
    if time.unit == TimeUnit.BATCH:
        return int(time.value)
    if time.unit == TimeUnit.EPOCH:
        return int(time.value) * plan.epoch_steps
    return -(-int(time.value) // plan.global_batch) if time.unit == TimeUnit.SAMPLE else None


def _check_cache(plan: TrainingPlan, data: LoaderConfig) -> None:
    if data.cache_limit is None or not plan.datasets:
        return
    limit, largest = bytes_to_int(data.cache_limit), max(dataset.largest_shard for dataset in plan.datasets)
    whole = sum(dataset.size + sum(dataset.sidecars.values()) for dataset in plan.datasets)
    if limit < 4 * largest:
        plan.problems.append(f'train_data.cache_limit: {data.cache_limit} is less than four shards, '
                             f'{readable(4 * largest)}')
    elif limit < whole:
        plan.warnings.append(f'train_data.cache_limit: {data.cache_limit} holds {limit / whole:.0%} of the data; the '
                             'rest is downloaded again every epoch')


@contextmanager
def _collected(plan: Plan) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        plan.problems.append(str(error))


def _measure(
    plan: TrainingPlan, config: TrainConfig, evaluated: Mapping[str, Sequence[str]], model: ComposerModel,
    make_model: Callable[[], ComposerModel], make_batch: Callable[[int], dict[str, Any]], longest: int = 0,
    online: Optional[OnlinePlan] = None, at_mean: Optional[Callable[[], ComposerModel]] = None,
) -> None:
    """A step's cost, how the largest microbatch is found, and checkpoints.

    Args:
        plan: Receives them.
        config: The run's.
        evaluated: Label of each evaluator -> names of its metrics.
        model: On the meta device; it is used up.
        make_model: Makes another.
        make_batch: Number of samples -> batch of the loader.
        longest: Tokens of each text in it.
        online: The teacher in the loop.
        at_mean: Makes one whose texts are as long as those of the data on average, for FLOPs.
    """
    with _collected(plan):
        check_metrics(config, evaluated)
    if not plan.measurable:
        return
    if config.fsdp is not None and config.fsdp.activation_cpu_offload:
        plan.warnings.append('fsdp.activation_cpu_offload: the peak is that without it')
    plan.groups = describe_groups(model, build_optimizer(config, model).param_groups)
    step = StepPlan(plan.ranks, plan.device_batch, plan.microbatch, 'grad_cache' in config.algorithms,
                    _precision(config), config.fsdp, 'ema' in config.algorithms, online,
                    isinstance(config, Stage2Config) and config.self_distillation.enabled)

    def rehearse(microbatch: int, model: Optional[ComposerModel] = None) -> StepCost:
        return rehearse_step(model or make_model(), partial(build_optimizer, config), make_batch,
                             dataclasses.replace(step, microbatch=microbatch))

    plan.cost = rehearse(plan.microbatch, model)
    if longest and plan.texts:
        plan.cost.shorten(plan.tokens / plan.texts / longest)
    if at_mean is not None:
        shorter = rehearse(plan.microbatch, at_mean())
        plan.cost.flops, plan.cost.recomputed, plan.cost.attention = (
            shorter.flops, shorter.recomputed, shorter.attention)
    gpu = GPUS[config.plan_gpu]
    if step.cached or plan.microbatch < plan.device_batch:
        plan.find_largest = partial(_largest, plan, gpu, rehearse)
    elif not gpu.fits(plan.cost.peak):
        plan.warnings.append(f'it does not fit one {config.plan_gpu}; algorithms.grad_cache allows a smaller '
                             'device_train_microbatch_size')
    plan.sharded_checkpoints = config.fsdp is not None and config.fsdp.state_dict_type == 'sharded'
    interval = _steps(config.save_interval, plan)
    plan.checkpoints = -(-plan.steps // interval) if interval and plan.steps is not None else None


def _largest(plan: TrainingPlan, gpu: GPU, rehearse: Callable[[int], StepCost]) -> int:
    """The largest share of the device batch whose step fits, or 0.  Memory grows evenly with the microbatch."""
    assert plan.cost is not None
    sizes = [n for n in range(1, plan.device_batch + 1) if plan.device_batch % n == 0]
    peaks = {plan.microbatch: plan.cost.peak}
    at = sizes.index(plan.microbatch) if plan.microbatch in sizes else 0
    other = sizes[at - 1] if at else sizes[1]
    peaks.setdefault(other, rehearse(other).peak)
    (n, first), (m, second) = list(peaks.items())
    for size in reversed(sizes):
        if gpu.fits(int(first + (second - first) / (m - n) * (size - n))):
            peaks[size] = peaks.get(size) or rehearse(size).peak
            if gpu.fits(peaks[size]):
                return size
    return 0


def _modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters per child, each counted once; LoRA weights apart from the LLM they adapt."""
    result: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = 'lora' if 'lora_' in name else name.removeprefix('model.').split('.')[0]
        trainable, frozen = result.get(part, (0, 0))
        n = parameter.numel()
        result[part] = (trainable + n, frozen) if parameter.requires_grad else (trainable, frozen + n)
    return result
