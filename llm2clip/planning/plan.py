# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a run will need and what will go wrong, from its configuration and the datasets' indexes alone."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
from composer.core import Precision, Time, TimeUnit
from composer.models import ComposerModel
from composer.utils import dist
from streaming.base.util import bytes_to_int

from llm2clip.config import (
    CaptionDataConfig,
    ConfigError,
    ExtractConfig,
    InheritanceConfig,
    PlanConfig,
    SentenceTransformersTeacherConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    TrainConfig,
)
from llm2clip.data.loader import shared_memory
from llm2clip.data.texts import with_two_captions
from llm2clip.imports.weights import check_initial_weights
from llm2clip.models.stage1 import MaskedNextTokenPrediction
from llm2clip.planning import datasets
from llm2clip.planning.datasets import DataPlan, collected
from llm2clip.planning.fake import fake_ranks
from llm2clip.planning.step import EncoderPlan, MeanMask, dry_run_encoder, dry_run_step, image_batch, precision_of
from llm2clip.planning.summary import GPUS, Plan, readable
from llm2clip.remote_code.checks_llm2clip import load_config
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder
from llm2clip.teacher.llm import load_llm, teacher_config
from llm2clip.training import inheritance, stage1, stage2
from llm2clip.training.text_encoders import TrainedTexts, load_trained_encoders
from llm2clip.training.trainer import check_metrics, check_train_config, possible_metrics

__all__ = ['plan_extraction', 'plan_inheritance', 'plan_run', 'plan_stage1', 'plan_stage2']

_UNKNOWN_DIM, _UNKNOWN_EMBED_DIM = 4096, 768
_GPUS_PER_NODE, _CHARACTERS_PER_TOKEN = 8, 4
# Tokens of each text -> a new model on the meta device, and number of samples -> batch.
_Make = Callable[[int], tuple[ComposerModel, Callable[[int], dict[str, Any]]]]


def plan_run(config: PlanConfig, plan: Callable[[Any], Plan]) -> None:
    """Print the plan.

    Raises:
        SystemExit: With 1, something will stop the run.
    """
    with fake_ranks(config.plan_ranks or dist.get_world_size()):
        result = plan(config)
        print(result, flush=True)
    if result.problems:
        raise SystemExit(1)


def plan_stage2(config: Stage2Config) -> Plan:
    """What stage 2 would need, and what would stop it.

    Raises:
        ConfigError: CLIP's text tower cannot be trained, or the LLM that would be is not known.
        LoadError: There is no such tower.
    """
    plan, data = _begin(config, lambda loader, key: datasets.plan_images(loader, key, not config.reads_vectors))
    teacher, llm, lengths = _text_encoders(config, plan, data.characters)

    def make_texts(length: int) -> TrainedTexts:
        """The text encoders that are trained, with fake tokenizers."""
        with torch.device('meta'):
            encoder, tower = load_trained_encoders(config.trainable_text, llm, on_meta=True, load_weights=False)
        names = ('input_ids', 'attention_mask', 'embed_mask')
        of_tower = names[:1] if tower is not None and 'siglip' in tower.config.model_type else names[:2]
        return TrainedTexts(
            None if encoder is None else (encoder, partial(_fake_tokens, length, names)),
            None if tower is None else (tower, partial(_fake_tokens, tower.config.max_position_embeddings, of_tower)))

    clip = make_texts(1).clip if config.without_llm else None
    dim = _teacher_width(config, data, plan) if clip is None else clip[0].width
    image_size = stage2.train_image_size(config.train_data, config.model.vision)
    captions = config.train_data.captions_per_image
    # A frozen LLM in the loop leaves vectors in the batch, too.
    vectors = dim if config.reads_vectors or config.text_encoder_in_loop.enabled else 0

    def make(length: int) -> Any:
        texts = make_texts(length) if config.reads_captions else None
        with torch.device('meta'):
            model = stage2.make_model(config, dim, load_weights=False, texts=texts)
        return model, lambda n: image_batch(n, image_size, vectors, captions, texts is not None)

    if config.initial_weights is not None:
        with collected(plan.problems):
            check_initial_weights(make(1)[0].model, config.model, config.initial_weights)
    _measure(plan, config, make, lengths, teacher)
    if plan.cost is not None:
        batch = image_batch(plan.device_batch, image_size, dim if config.reads_vectors else 0, captions)
        plan.shared_memory = shared_memory(batch, config.train_data.num_workers, epoch_samples=plan.drawn,
                                           ranks=min(_GPUS_PER_NODE, plan.ranks))
    return plan


def _text_encoders(
    config: Stage2Config, plan: Plan, characters: float
) -> tuple[Optional[EncoderPlan], Optional[TextEncoderConfig], tuple[int, int]]:
    """The frozen teacher in the loop, the LLM that is trained, and the lengths of its captions for `_measure`."""
    key = 'trainable_text.lora' if config.trainable_text.lora is not None else 'text_encoder_in_loop.enabled'
    captions = config.train_data.captions_per_image
    if config.trainable_text.lora is None and not config.text_encoder_in_loop.enabled:
        return None, None, (0, 0)
    if isinstance(config.teacher, SentenceTransformersTeacherConfig):
        plan.warnings.append('teacher: of those in the loop only LLMs are planned; what this one takes comes on top')
        return None, None, (0, 0)
    llm = _teacher_config(config)
    if llm is None:
        raise ConfigError(f'teacher: there is none in {config.teacher}, which {key} needs; plan_llm lets it be planned '
                          'before it is there')
    if isinstance(config.teacher, str) and not Path(config.teacher).is_dir():
        plan.problems.append(f'teacher: {key} needs one, and there is none in {config.teacher}')
    texts = int(plan.repeats or 0) * config.global_train_batch_size * captions
    tokens = _count_tokens(plan, characters, texts, llm.max_length)
    if config.text_encoder_in_loop.enabled:
        in_loop = config.text_encoder_in_loop
        encoder = on_meta(dataclasses.replace(llm, dtype='float32') if in_loop.sharded else llm)
        teacher = EncoderPlan(encoder, tokens, in_loop.batch_tokens, in_loop.precision, in_loop.sharded, captions)
        return teacher, None, (0, 0)
    plan.warnings.append(f'memory is that of captions as long as the LLM reads, {llm.max_length:,} tokens; the time is '
                         f'that of {tokens:,}, without the padding to the longest of a microbatch')
    return None, dataclasses.replace(llm, dtype='float32'), (llm.max_length, tokens)


def plan_inheritance(config: InheritanceConfig) -> Plan:
    """What inheritance would need, and what would stop it."""
    plan, data = _begin(config, datasets.plan_targets)
    dim, embed_dim = _teacher_width(config, data, plan), data.embed_dim or _UNKNOWN_EMBED_DIM
    if not data.embed_dim:
        plan.warnings.append(f'the width of the targets is not known, {embed_dim} is assumed')

    def batch(n: int) -> dict[str, Any]:
        return {'index': torch.zeros(n, dtype=torch.long), 'counted': torch.ones(n, dtype=torch.bool),
                'text_embedding': torch.empty(n, dim, dtype=torch.float16), 'target': torch.empty(n, embed_dim)}

    def make(tokens: int) -> Any:
        with torch.device('meta'):
            return inheritance.make_model(config, dim, embed_dim), batch

    _measure(plan, config, make)
    return plan


def plan_stage1(config: Stage1Config) -> Plan:
    """What stage 1 would need, and what would stop it."""
    config = dataclasses.replace(config, text_encoder=_described(config.text_encoder, config.plan_llm))
    mntp, longest = config.objective == 'mntp', config.text_encoder.max_length

    def read(loader: CaptionDataConfig, key: str) -> DataPlan:
        if key == 'train_data':
            return datasets.plan_texts(loader, key, mntp)
        two = None if mntp else with_two_captions(loader, key)
        return DataPlan() if two is None else datasets.plan_texts(two, key, mntp, train=False)

    plan, data = _begin(config, read, per_stream=not mntp)
    if config.plan_samples is not None:
        streams = config.train_data.streams.values()
        pairs = [*config.train_data.pairs, *(pair for stream in streams for pair in stream.pairs or [])]
        data.negative = any(pair.has_negative for pair in pairs)
    sides = [''] if mntp else ['query_', 'positive_', *(['negative_'] if data.negative else [])]
    texts = int(plan.repeats or 0) * config.global_train_batch_size * len(sides)
    tokens = _count_tokens(plan, data.characters, texts, longest)
    plan.warnings.append(f'memory is that of texts as long as text_encoder.max_length, {longest} tokens')

    def make(tokens: int) -> Any:
        with torch.device('meta'):
            model = stage1.make_model(config, on_meta=True)
            if isinstance(model, MaskedNextTokenPrediction):
                model = MeanMask(model.text_encoder, model.head)
                model.probability = config.mntp.mask_probability
        names = ('input_ids', 'attention_mask', *(() if mntp else ('embed_mask',)))
        return model, lambda n: {
            'index': torch.zeros(n, dtype=torch.long),
            **{f'{side}text_id': torch.zeros(n, dtype=torch.long) for side in sides},
            **{side + name: torch.ones(n, tokens, dtype=torch.long) for side in sides for name in names}}

    _measure(plan, config, make, (longest, tokens))
    return plan


def plan_extraction(config: ExtractConfig) -> Plan:
    """What an extraction would need, and what would stop it."""
    data = datasets.plan_sources(config.datasets, 'datasets') if config.plan_samples is None else DataPlan()
    plan = Plan(config, dist.get_world_size(), config.precision != 'fp32', 'pass', data.problems,
                datasets=data.datasets)
    plan.drawn = texts = sum(dataset.texts for dataset in data.datasets) or int(config.plan_samples or 0)
    encoder = _teacher_config(config)
    if not isinstance(config.teacher, (str, TextEncoderConfig)):
        plan.problems.append(f'teacher.type: {config.teacher.type!r}, but only the extraction of an LLM is planned')
    elif encoder is None:
        plan.problems.append(f'teacher: there is none in {config.teacher}; plan_llm lets it be planned before it is '
                             'there')
    else:
        tokens = _count_tokens(plan, data.characters, texts, encoder.max_length)
        forward = EncoderPlan(on_meta(encoder), tokens, config.batch_tokens, config.precision)
        plan.cost = dry_run_encoder(forward)
        plan.repeats = texts / forward.captions / plan.ranks
        dim = forward.encoder.llm_embed_dim
        plan.vectors = {dataset.name: dataset.texts * (2 * dim if config.storage == 'float16' else dim + 4)
                        for dataset in data.datasets or [datasets.DatasetPlan('all', texts=texts)]}
    return plan


def _begin(config: Any, read: Callable[[Any, str], DataPlan], per_stream: bool = False) -> tuple[Plan, DataPlan]:
    """Steps and data, which are `read` where `plan_samples` says nothing; `per_stream`, a batch is of one dataset."""
    data, cache_limit = DataPlan(), config.train_data.cache_limit
    if config.plan_samples is None:
        data = read(config.train_data, 'train_data')
        if config.eval_data is not None:
            data.problems += read(config.eval_data, 'eval_data').problems
    ranks, batch = dist.get_world_size(), config.global_train_batch_size
    device_batch = batch // ranks
    half = precision_of(config.precision, config.device) != Precision.FP32
    plan = Plan(config, ranks, half, problems=data.problems, datasets=data.datasets,
                global_batch=batch, device_batch=device_batch,
                microbatch=config.device_train_microbatch_size or device_batch,
                drawn=int(config.plan_samples or sum(dataset.drawn for dataset in data.datasets)),
                kept=config.save_num_checkpoints_to_keep)
    if per_stream and data.datasets:
        plan.epoch_steps = sum(dataset.drawn // batch for dataset in data.datasets)
    else:
        plan.epoch_steps = -(-plan.drawn // ranks) // max(1, device_batch)
    plan.repeats = _steps(config.max_duration, plan)
    interval = _steps(config.save_interval, plan)
    plan.checkpoints = -(-plan.repeats // interval) if interval and plan.repeats is not None else None
    if plan.drawn and not plan.epoch_steps:
        plan.problems.append(f'train_data: an epoch has {plan.drawn:,} samples, fewer than one global batch of '
                             f'{batch:,}')
    needed = 4 * max((dataset.largest_shard for dataset in data.datasets), default=0)
    if cache_limit is not None and bytes_to_int(cache_limit) < needed:
        plan.problems.append(f'train_data.cache_limit: {cache_limit} is less than four shards, {readable(needed)}')
    return plan, data


def _steps(duration: str, plan: Plan) -> Optional[int]:
    time = Time.from_timestring(duration)
    if time.unit == TimeUnit.BATCH:
        return int(time.value)
    if time.unit == TimeUnit.EPOCH:
        return int(time.value) * plan.epoch_steps
    return -(-int(time.value) // plan.global_batch) if time.unit == TimeUnit.SAMPLE else None


def _teacher_width(config: Any, data: DataPlan, plan: Plan) -> int:
    """Width of the teacher's vectors, as its embeddings, its folder or `plan_llm` say, or a guess."""
    dim = data.llm_embed_dim
    if not dim and (encoder := _teacher_config(config)) is not None:
        dim = load_config(encoder.pretrained, gguf_file=encoder.gguf_file).hidden_size
    if not dim:
        plan.warnings.append(f'the width of the teacher\'s vectors is not known, {_UNKNOWN_DIM} is assumed')
    return dim or _UNKNOWN_DIM


def _teacher_config(config: Union[ExtractConfig, InheritanceConfig, Stage2Config]) -> Optional[TextEncoderConfig]:
    """How the LLM that a configuration names encodes, or the one that `plan_llm` names; None if neither is known."""
    if isinstance(config.teacher, TextEncoderConfig):
        return _described(config.teacher, config.plan_llm)
    if isinstance(config.teacher, str) and Path(config.teacher).is_dir():
        return teacher_config(config.teacher)
    return None if config.plan_llm is None else TextEncoderConfig(pretrained=config.plan_llm)


def _described(config: TextEncoderConfig, llm: Optional[str]) -> TextEncoderConfig:
    """The same encoder, with the architecture of the folder `llm`, if that is given."""
    return config if llm is None else dataclasses.replace(config, pretrained=llm, gguf_file=None, adapters=[])


def on_meta(config: TextEncoderConfig) -> TextEncoder:
    """The encoder without memory for its weights."""
    return TextEncoder(load_llm(config, on_meta=True), config)


def _fake_tokens(length: int, names: Sequence[str], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a tokenizer would give."""
    return {name: torch.ones(len(texts), length, dtype=torch.long) for name in names}


def _count_tokens(plan: Plan, characters: float, texts: int, longest: int) -> int:
    """Put the number of texts and tokens into the plan; returns the tokens of one text on average."""
    tokens = plan.options.plan_tokens
    if tokens is None and characters:
        tokens = round(characters / _CHARACTERS_PER_TOKEN) + 1
    if tokens is None:
        plan.warnings.append(f'every text is taken to have {longest:,} tokens, the most that the encoder reads; '
                             'plan_tokens says how many they have on average')
    tokens = min(tokens or longest, longest)
    plan.texts, plan.tokens = texts, texts * tokens
    return tokens


def _measure(
    plan: Plan, config: TrainConfig, make: _Make, lengths: tuple[int, int] = (0, 0),
    teacher: Optional[EncoderPlan] = None,
) -> None:
    """Check the parts of the configuration, and find a step's cost.

    Memory is that of the first of `lengths`, tokens of the longest text, and FLOPs are those of the second, the mean.
    """
    longest, mean = lengths
    model, make_batch = make(longest)
    for name, parameter in model.named_parameters():
        part = 'lora' if 'lora_' in name else name.removeprefix('model.').split('.')[0]
        trainable, frozen = plan.modules.get(part, (0, 0))
        n = parameter.numel()
        plan.modules[part] = (trainable + n, frozen) if parameter.requires_grad else (trainable, frozen + n)
    with collected(plan.problems):
        check_metrics(config, possible_metrics(config))
    try:
        check_train_config(config)
        plan.cost = dry_run_step(model, config, make_batch, teacher)
    except ConfigError as error:
        plan.problems.append(str(error))
        return
    if mean < longest:
        model, make_batch = make(mean)
        shorter = dry_run_step(model, config, make_batch, teacher)
        plan.cost.flops, plan.cost.recomputed = shorter.flops, shorter.recomputed
    fsdp, vision = config.fsdp, config.model.vision if isinstance(config, Stage2Config) else None
    if fsdp is not None and fsdp.activation_cpu_offload:
        plan.warnings.append('fsdp.activation_cpu_offload: the peak is that without it')
    if not GPUS[config.plan_gpu].fits(plan.cost.peak):
        recomputed = fsdp is not None and fsdp.activation_checkpointing or vision and vision.gradient_checkpointing
        key = 'fsdp.activation_checkpointing' if fsdp is not None or vision is None else (
            'model.vision.gradient_checkpointing')
        way = '' if recomputed else f'{key}=true recomputes activations in the backward pass, and '
        plan.warnings.append(f'it does not fit one {config.plan_gpu}; {way}algorithms.grad_cache allows a smaller '
                             'device_train_microbatch_size')
