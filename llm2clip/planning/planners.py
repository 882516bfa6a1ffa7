# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Requirements and detectable errors of a run, from its configuration and the datasets' indexes alone."""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from composer.core import Time, TimeUnit
from composer.models import ComposerModel
from streaming.base.util import bytes_to_int
from tqdm import tqdm

from llm2clip.config import (
    ExtractConfig,
    ExtractImagesConfig,
    InheritanceConfig,
    PlanConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    TextPlanConfig,
)
from llm2clip.config.teacher import teacher_type
from llm2clip.data.image_text_dataset import reads_image_embeddings
from llm2clip.data.loader import shared_memory
from llm2clip.data.streams.safe_dataset import padded_epoch_size
from llm2clip.errors import ConfigError, under
from llm2clip.modeling.loaders import load_config
from llm2clip.modeling.text_encoder import TextEncoder
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.models.inherited_adapter import ComposerInheritance
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.models.masked_next_token import MaskedNextTokenPrediction
from llm2clip.models.towers import train_image_size
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.planning.datasets import (
    add_all,
    add_captions,
    add_images,
    add_targets,
    collect_errors,
    on_disk,
)
from llm2clip.planning.dry_run import EncoderPass, dry_run_step, dry_run_tower, fake_ranks
from llm2clip.planning.plan import Plan
from llm2clip.ranks import dist
from llm2clip.teacher.clip_text import ClipTextTower
from llm2clip.teacher.llm import load_llm, teacher_config
from llm2clip.training import inheritance, stage1, stage2
from llm2clip.training.config_checks import check_metrics, check_train_config
from llm2clip.training.runs import check_initial_weights
from llm2clip.training.text_encoders import TrainedText, load_trained_encoder

_UNKNOWN_DIM, _UNKNOWN_EMBED_DIM = 4096, 768
_GPUS_PER_NODE, _CHARACTERS_PER_TOKEN = 8, 4
# Of DreamLIP's seven captions of an image, three have about 100 words, three about 20 and the raw one 10: on
# average 53 words, which are 70 tokens.  Template and instruction take 10.
_CAPTION_TOKENS = 80
# Bytes per value of a stored vector, and of its scale.
_STORAGE_BYTES = {'float16': (2, 0), 'float32': (4, 0), 'int8': (1, 4)}
# Tokens per text -> new model on the meta device, and a function from a number of samples to a batch.
_MakeStep = Callable[[int], tuple[ComposerModel, Callable[[int], dict[str, Any]]]]


def plan_run(config: PlanConfig) -> None:
    """Print the plan.

    Raises:
        SystemExit: With status 1 if something will stop the run.
    """
    with fake_ranks(config.plan_ranks):
        plan = make_plan(config)
        print(plan, flush=True)
    if plan.errors:
        raise SystemExit(1)


def make_plan(config: PlanConfig) -> Plan:
    """Return what a training or an extraction needs, and what would stop it.

    Raises:
        ConfigError: CLIP's text tower cannot be trained, or the LLM to train is not known.
        LoadError: There is no such text tower.
    """
    planners: dict[Any, Callable[[Any], Plan]] = {
        Stage1Config: _plan_stage1, Stage2Config: _plan_stage2, InheritanceConfig: _plan_inheritance,
        ExtractConfig: _plan_extraction, ExtractImagesConfig: _plan_image_extraction}
    return planners[type(config)](config)


def _plan_stage2(config: Stage2Config) -> Plan:
    """Plan images, towers, adapter, and the LLM if it is in the loop or trained."""
    plan = _plan_training(config, add_images)
    teacher, llm, lengths = _text_encoders(config, plan)
    if config.trainable_text.clip is None:
        dim = _teacher_width(config, plan)
    else:
        clip_text = _trainable_text(config, llm, 1).encoder
        dim = clip_text.llm_embed_dim

    def make_model(length: int) -> ComposerLLM2CLIP:
        text = _trainable_text(config, llm, length) if config.reads_captions else None
        with torch.device('meta'):
            return stage2.make_model(config, dim, load_weights=False, text=text)

    image_width = 0  # of image embeddings
    if reads_image_embeddings(config.train_data):
        image_width = make_model(1).model.vision_encoder.width
    image_size = train_image_size(config.train_data, config.model.vision)
    captions = config.train_data.captions_per_image

    def make_step(length: int) -> Any:
        # A frozen LLM in the loop puts vectors into the batch as well.
        text_width = 0 if config.reads_captions else dim
        return make_model(length), lambda n: image_batch(n, image_size, text_width, captions, image_width)

    if config.initial_weights is not None:
        with collect_errors(plan.errors):
            check_initial_weights(make_model(1).model, config.model, config.initial_weights)
    _measure(plan, config, make_step, stage2.possible_metrics(config), lengths, teacher)
    if plan.cost.peak:
        text_width = dim if config.reads_vectors else 0
        batch = image_batch(plan.device_batch, image_size, text_width, captions, image_width)
        plan.shared_memory = shared_memory(batch, config.train_data.num_workers,
                                           epoch_samples=plan.epoch_samples,
                                           ranks=min(_GPUS_PER_NODE, plan.ranks))
    return plan


def _trainable_text(config: Stage2Config, llm: Optional[TextEncoderConfig], length: int) -> TrainedText:
    """Return the text encoder to train, with a fake tokenizer of `length` tokens; CLIP has its own length."""
    with torch.device('meta'):
        encoder = load_trained_encoder(config.trainable_text, llm, on_meta=True, load_weights=False)
    names = ['input_ids', 'attention_mask', 'embed_mask']
    if isinstance(encoder, ClipTextTower):
        length = encoder.config.max_position_embeddings
        names.remove('embed_mask')
        if 'siglip' in encoder.config.model_type:
            names.remove('attention_mask')
    return TrainedText(encoder, lambda texts: {
        name: torch.ones(len(texts), length, dtype=torch.long) for name in names})


def image_batch(
    n: int, image_size: int, llm_embed_dim: int = 0, captions: int = 1, width: int = 0
) -> dict[str, Any]:
    """Return a stage-2 batch of `n` samples.

    Each sample has `captions` vectors or, if `llm_embed_dim` is 0, texts.  If `width` is above 0, it has an
    image embedding of that width in place of an image.
    """
    shape = (n,) if captions == 1 else (n, captions)
    batch: dict[str, Any] = {name: torch.zeros(n, dtype=torch.long) for name in ('index', 'sample_seed')}
    batch['text_id'] = torch.zeros(shape, dtype=torch.long)
    if width:
        batch['image_embedding'] = torch.empty(n, width, dtype=torch.float16)
    else:
        batch['pixel_values'] = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8)
    if llm_embed_dim:
        batch['text_embedding'] = torch.empty(*shape, llm_embed_dim, dtype=torch.float16)
    elif captions == 1:
        batch['caption'] = ['-'] * n
    else:
        batch['caption'] = [['-'] * n] * captions
    return batch


def _text_encoders(
    config: Stage2Config, plan: Plan
) -> tuple[Optional[EncoderPass], Optional[TextEncoderConfig], tuple[int, int]]:
    """Return the frozen teacher in the loop, the LLM to train, and the lengths of its captions for
    `_measure`."""
    in_loop = config.text_encoder_in_loop
    captions = config.train_data.captions_per_image
    if config.trainable_text.lora is None and not in_loop.enabled:
        return None, None, (0, 0)
    if teacher_type(config.teacher) == 'sentence_transformers':
        plan.warnings.append('teacher: of those in the loop only LLMs are planned; what this one takes comes '
                             'on top')
        return None, None, (0, 0)
    key = 'text_encoder_in_loop.enabled' if in_loop.enabled else 'trainable_text.lora'
    llm = _teacher_config(config)
    if llm is None:
        raise ConfigError(f'there is none in {config.teacher}, which {key} needs; plan_llm lets it be '
                          'planned before it is there', key='teacher')
    if isinstance(config.teacher, str) and not Path(config.teacher).is_dir():
        plan.errors.append(f'teacher: {key} needs one, and there is none in {config.teacher}')
    texts = int(plan.steps or 0) * config.global_train_batch_size * captions
    tokens = _count_tokens(plan, config, texts, llm.max_length)
    in_float32 = dataclasses.replace(llm, dtype='float32')
    if in_loop.enabled:
        encoder = on_meta(in_float32 if in_loop.sharded else llm)
        teacher = EncoderPass(encoder, tokens, in_loop.batch_tokens, in_loop.precision, in_loop.sharded,
                              captions)
        return teacher, None, (0, 0)
    plan.warnings.append(f'memory is that of captions as long as the LLM reads, {llm.max_length:,} tokens; '
                         f'the time is that of {tokens:,}, without the padding to the longest of a '
                         'microbatch')
    return None, in_float32, (llm.max_length, tokens)


def _plan_inheritance(config: InheritanceConfig) -> Plan:
    """Plan the adapter alone, on vectors of the teacher and of CLIP."""
    plan = _plan_training(config, add_targets)
    dim = _teacher_width(config, plan)
    if not plan.embed_dim:
        plan.embed_dim = _UNKNOWN_EMBED_DIM
        plan.warnings.append(f'the width of the targets is not known, {plan.embed_dim} is assumed')

    def make_batch(n: int) -> dict[str, Any]:
        return {'index': torch.zeros(n, dtype=torch.long), 'counted': torch.ones(n, dtype=torch.bool),
                'text_embedding': torch.empty(n, dim, dtype=torch.float16),
                'target': torch.empty(n, plan.embed_dim)}

    def make_step(tokens: int) -> Any:
        with torch.device('meta'):
            return inheritance.make_model(config, dim, plan.embed_dim), make_batch

    _measure(plan, config, make_step, {'eval': [*ComposerInheritance.metrics]})
    return plan


def _plan_stage1(config: Stage1Config) -> Plan:
    """Plan the LLM with its LoRA weights, on texts of the maximum length."""
    config = dataclasses.replace(config, text_encoder=_described(config.text_encoder, config.plan_llm))
    longest = config.text_encoder.max_length
    plan = _plan_training(config, add_captions, mixes_datasets=config.objective == 'mntp')
    data = config.train_data
    pairs = [stream.pairs or data.pairs for stream in data.streams.values()]
    names = ['input_ids', 'attention_mask']
    if config.objective == 'mntp':
        sides = ['']
    else:
        names.append('embed_mask')
        sides = ['query_', 'positive_']
        if any(pair.has_negative for pair in chain.from_iterable(pairs)):
            sides.append('negative_')
    texts = int(plan.steps or 0) * config.global_train_batch_size * len(sides)
    mean = _count_tokens(plan, config, texts, longest)
    plan.warnings.append(f'memory is that of texts as long as text_encoder.max_length, {longest} tokens')

    def make_batch(tokens: int, n: int) -> dict[str, Any]:
        batch = {'index': torch.zeros(n, dtype=torch.long)}
        for side in sides:
            batch[f'{side}text_id'] = torch.zeros(n, dtype=torch.long)
            for name in names:
                batch[side + name] = torch.ones(n, tokens, dtype=torch.long)
        return batch

    def make_step(tokens: int) -> Any:
        with torch.device('meta'):
            model = stage1.make_model(config, on_meta=True)
            if isinstance(model, MaskedNextTokenPrediction):
                model = _MeanMask(model, config.mntp.mask_probability)
        return model, partial(make_batch, tokens)

    _measure(plan, config, make_step, {'eval': [*CaptionContrastive.metrics]}, (longest, mean),
             sides=len(sides))
    plan.teacher = 4 * sum(plan.modules['text_encoder'])  # in float32, with LoRA merged
    return plan


class _MeanMask(MaskedNextTokenPrediction):
    """Mask the mean number of tokens, at any positions, because fake tensors have no values."""

    def __init__(self, model: MaskedNextTokenPrediction, probability: float) -> None:
        super().__init__(model.text_encoder, model.head)
        self.probability = probability

    def loss(self, outputs: torch.Tensor, batch: dict[str, Any], *args: Any) -> torch.Tensor:
        states = outputs.flatten(0, 1)[:int(outputs.shape[0] * outputs.shape[1] * self.probability)]
        return F.cross_entropy(self.head(states).float(), torch.zeros(len(states), dtype=torch.long))


def _plan_extraction(config: ExtractConfig) -> Plan:
    """Plan the passes of the teacher over all captions, and the size of their vectors."""
    plan = Plan(config, dist.get_world_size())
    captions: dict[str, int] = {}
    if config.plan_samples is None:
        add_all(plan, config.datasets)
        captions = {dataset.name: dataset.texts for dataset in plan.datasets}
    else:
        plan.images = int(config.plan_samples)
        available = Plan(config, plan.ranks)
        add_all(available, on_disk(config.datasets))
        plan.characters = available.characters
        plan.captions = config.plan_captions
        samples = sum(dataset.samples for dataset in available.datasets)
        if samples:
            plan.captions = sum(dataset.texts for dataset in available.datasets) / samples
        else:
            plan.warnings.append(f'no dataset is on disk, so {config.plan_captions} captions per image are '
                                 'assumed; plan_captions sets another number')
        captions['all'] = round(plan.images * plan.captions)
    plan.unit = 'pass'
    texts = plan.epoch_samples = sum(captions.values())
    encoder = _teacher_config(config)
    if teacher_type(config.teacher) not in ('folder', 'llm'):
        plan.warnings.append(f'teacher.type: only the extraction of an LLM is planned, not of '
                             f'{config.teacher.type}')
    elif encoder is None:
        plan.errors.append(f'teacher: there is none in {config.teacher}; plan_llm lets it be planned before '
                           'it is there')
    else:
        tokens = _count_tokens(plan, config, texts, encoder.max_length)
        forward = EncoderPass(on_meta(encoder), tokens, config.batch_tokens, config.precision)
        plan.cost = forward.dry_run()
        plan.steps = texts / forward.captions / plan.ranks
        size = _vector_size(forward.encoder.llm_embed_dim, config.storage)
        plan.vectors = {name: number * size for name, number in captions.items()}
    return plan


def _plan_image_extraction(config: ExtractImagesConfig) -> Plan:
    """Plan the passes of the frozen tower over all images, and the size of their vectors."""
    plan = Plan(config, dist.get_world_size())
    images: dict[str, int] = {}
    if config.plan_samples is None:
        add_all(plan, config.datasets)
        images = {dataset.name: dataset.samples for dataset in plan.datasets}
    else:
        images['all'] = int(config.plan_samples)
    plan.unit = 'pass'
    plan.images = plan.epoch_samples = sum(images.values())
    with under('vision'), torch.device('meta'):
        tower = VisionEncoder(config.vision, load_weights=False)
    plan.cost = dry_run_tower(tower, config.batch_size, config.precision)
    plan.steps = plan.epoch_samples / config.batch_size / plan.ranks
    size = _vector_size(tower.width, config.storage)
    plan.vectors = {name: number * size for name, number in images.items()}
    return plan


def _vector_size(dim: int, storage: str) -> int:
    """Return the bytes of a stored vector of `dim` values."""
    value_bytes, scale_bytes = _STORAGE_BYTES[storage]
    return value_bytes * dim + scale_bytes


def _plan_training(
    config: Any, add_datasets: Callable[[Plan, Any, str], None], mixes_datasets: bool = True
) -> Plan:
    """Plan the data, steps and checkpoints of a training.

    `add_datasets` adds the datasets that it reads by ``train_data`` or ``eval_data``.  Without
    `mixes_datasets`, each global batch comes from one of them.
    """
    plan = Plan(config, dist.get_world_size())
    if config.plan_samples is None:
        add_datasets(plan, config, 'train_data')
        if config.eval_data is not None:
            evaluation = Plan(config, plan.ranks)
            add_datasets(evaluation, config, 'eval_data')
            plan.errors += evaluation.errors
    elif there := on_disk(config.train_data.streams):
        data = dataclasses.replace(config.train_data, streams=there)
        measured = Plan(config, plan.ranks)
        add_datasets(measured, dataclasses.replace(config, train_data=data), 'train_data')
        plan.characters = measured.characters
    plan.global_batch = config.global_train_batch_size
    plan.device_batch = plan.global_batch // plan.ranks
    plan.microbatch = config.device_train_microbatch_size or plan.device_batch
    plan.epoch_samples = int(config.plan_samples or sum(dataset.epoch_samples for dataset in plan.datasets))
    nodes = config.train_data.num_canonical_nodes
    if plan.datasets and not mixes_datasets:
        for dataset in plan.datasets:
            plan.epoch_steps += padded_epoch_size(dataset.epoch_samples, nodes) // plan.global_batch
    else:
        rank_samples = -(-padded_epoch_size(plan.epoch_samples, nodes) // plan.ranks)
        plan.epoch_steps = rank_samples * plan.ranks // plan.global_batch
    plan.steps = _steps(config.max_duration, plan)
    plan.kept = config.save_num_checkpoints_to_keep
    interval = _steps(config.save_interval, plan)
    if interval and plan.steps is not None:
        plan.checkpoints = -(-plan.steps // interval)
    _check_sizes(plan, config.train_data.cache_limit)
    for dataset in plan.datasets:
        least = 1 if mixes_datasets else plan.global_batch
        if dataset.epoch_samples < least:
            plan.errors.append(f'train_data.streams.{dataset.name}: an epoch takes {dataset.epoch_samples:,} '
                               f'samples of it, expected at least {least:,}')
    return plan


def _check_sizes(plan: Plan, cache_limit: Optional[Union[int, str]]) -> None:
    """Add an error if an epoch is shorter than a global batch, or the cache too small for the shards."""
    is_short = plan.epoch_samples < plan.global_batch or not plan.epoch_steps
    if plan.epoch_samples and is_short:
        plan.errors.append(f'global_train_batch_size: {plan.global_batch:,}, but an epoch of train_data has '
                           f'{plan.epoch_samples:,} samples, expected at least one global batch')
    needed = 4 * max((dataset.largest_shard for dataset in plan.datasets), default=0)
    if cache_limit is not None and bytes_to_int(cache_limit) < needed:
        plan.errors.append(f'train_data.cache_limit: {cache_limit} is less than four shards, '
                           f'{tqdm.format_sizeof(needed, "B")}')


def _steps(duration: str, plan: Plan) -> Optional[int]:
    """Return the number of steps in a duration; None if it is in tokens, or a fraction of the run."""
    time = Time.from_timestring(duration)
    samples = {TimeUnit.SAMPLE: 1, TimeUnit.BATCH: plan.global_batch,
               TimeUnit.EPOCH: plan.epoch_steps * plan.global_batch}
    if time.unit not in samples:
        return None
    return -(-int(time.value) * samples[time.unit] // plan.global_batch)


def _teacher_width(config: Any, plan: Plan) -> int:
    """Return the width of the teacher's vectors, from its embeddings, its folder or `plan_llm`,
    or else a guess."""
    if plan.llm_embed_dim:
        return plan.llm_embed_dim
    encoder = _teacher_config(config)
    if encoder is not None:
        return load_config(encoder.pretrained, gguf_file=encoder.gguf_file).hidden_size
    plan.warnings.append(f'the width of the teacher\'s vectors is not known, {_UNKNOWN_DIM} is assumed')
    return _UNKNOWN_DIM


def _teacher_config(
    config: Union[ExtractConfig, InheritanceConfig, Stage2Config]
) -> Optional[TextEncoderConfig]:
    """Return the text encoder that a configuration names, or else the LLM in `plan_llm`;
    None if neither is known."""
    if teacher_type(config.teacher) == 'llm':
        return _described(config.teacher, config.plan_llm)
    if isinstance(config.teacher, str) and Path(config.teacher).is_dir():
        return teacher_config(config.teacher)
    if config.plan_llm is None:
        return None
    return TextEncoderConfig(pretrained=config.plan_llm)


def _described(config: TextEncoderConfig, llm: Optional[str]) -> TextEncoderConfig:
    """Return the same encoder, with the architecture in the folder `llm`, if given."""
    if llm is None:
        return config
    return dataclasses.replace(config, pretrained=llm, gguf_file=None, adapters=[])


def on_meta(config: TextEncoderConfig) -> TextEncoder:
    """Build the encoder on the meta device."""
    return TextEncoder(load_llm(config, on_meta=True), config)


def _count_tokens(plan: Plan, config: TextPlanConfig, texts: int, longest: int) -> int:
    """Record the number of texts and tokens in the plan, and return the mean number of tokens per text."""
    if config.plan_tokens is not None:
        tokens = config.plan_tokens
    elif plan.characters:
        tokens = round(plan.characters / _CHARACTERS_PER_TOKEN) + 1
    else:
        plan.warnings.append(f'no text is on disk, so a mean of {_CAPTION_TOKENS} tokens is assumed, that of '
                             'DreamLIP\'s captions; plan_tokens sets another')
        tokens = _CAPTION_TOKENS
    tokens = min(tokens, longest)
    plan.texts, plan.tokens = texts, texts * tokens
    return tokens


def _measure(
    plan: Plan, config: Any, make_step: _MakeStep, metrics: dict[str, list[str]],
    lengths: tuple[int, int] = (0, 0), teacher: Optional[EncoderPass] = None, sides: int = 1,
) -> None:
    """Check parts of the configuration, and measure the cost of a step.

    `metrics` are those that each evaluation may compute, if there is one.  `lengths` are tokens per text:
    that of the longest text, which decides memory, and the mean, which decides FLOPs.  A sample has `sides`
    texts.
    """
    longest, mean = lengths
    model, make_batch = make_step(longest)
    for name, parameter in model.named_parameters():
        part = 'lora' if 'lora_' in name else name.removeprefix('model.').split('.')[0]
        trainable, frozen = plan.modules.get(part, (0, 0))
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
        plan.modules[part] = trainable, frozen
    if config.eval_data is None:
        metrics.pop('eval', None)
    with collect_errors(plan.errors):
        check_metrics(config, metrics)
    with collect_errors(plan.errors):
        check_train_config(config)
        plan.cost = dry_run_step(model, _in_microbatches(config, plan, sides * longest), make_batch, teacher)
        if mean < longest:
            model, make_batch = make_step(mean)
            config = _in_microbatches(config, plan, sides * mean)
            shorter = dry_run_step(model, config, make_batch, teacher)
            plan.cost.take_work(shorter)
            plan.microbatch = config.device_train_microbatch_size or plan.device_batch
        if config.fsdp is not None and config.fsdp.activation_cpu_offload:
            plan.warnings.append('fsdp.activation_cpu_offload: the peak is that without it')


def _in_microbatches(config: Any, plan: Plan, sample_tokens: int) -> Any:
    """Return the configuration with the microbatch size that its `device_train_microbatch_tokens`, if there
    are any, allow for samples of so many tokens."""
    tokens = getattr(config, 'device_train_microbatch_tokens', None)
    if tokens is None:
        return config
    size = min(max(1, tokens // sample_tokens), plan.microbatch)
    return dataclasses.replace(config, device_train_microbatch_size=size)
