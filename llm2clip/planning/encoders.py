# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The LLM of a plan: a teacher's folder, an LLM's own files, or its architecture alone."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch

from llm2clip.config import (
    ConfigError,
    ExtractConfig,
    InheritanceConfig,
    PlanConfig,
    Stage2Config,
    TextEncoderConfig,
)
from llm2clip.planning.datasets import DataPlan
from llm2clip.planning.step import OnlinePlan
from llm2clip.planning.summary import Plan
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder
from llm2clip.teacher.folder import teacher_config
from llm2clip.teacher.llm import load_llm
from llm2clip.training.text_encoders import TrainedTexts, load_trained_encoders

__all__ = [
    'TextsPlan', 'count_tokens', 'described', 'extracting_encoder', 'on_meta', 'online_teacher', 'teacher_encoder',
    'trained_texts',
]

_CHARACTERS_PER_TOKEN = 4
_Config = Union[ExtractConfig, InheritanceConfig, Stage2Config]
_OF_SIGLIP = ('input_ids',)
_OF_CLIP = (*_OF_SIGLIP, 'attention_mask')
_OF_LLM = (*_OF_CLIP, 'embed_mask')


def described(config: TextEncoderConfig, llm: Optional[str]) -> TextEncoderConfig:
    """The same encoder, whose architecture is read from the folder `llm`, if it is given, and not from its own."""
    return config if llm is None else dataclasses.replace(config, pretrained=llm, gguf_file=None, adapters=[])


def on_meta(config: TextEncoderConfig) -> TextEncoder:
    """The encoder without memory for its weights."""
    return TextEncoder(load_llm(config, on_meta=True), config)


def teacher_encoder(config: _Config) -> Optional[TextEncoderConfig]:
    """How the LLM that a configuration names encodes, or as what it is planned; None if neither is known."""
    if config.text_encoder is not None:
        return described(config.text_encoder, config.plan_llm)
    if config.teacher is not None and Path(config.teacher).is_dir():
        return teacher_config(config.teacher)
    return None if config.plan_llm is None else TextEncoderConfig(pretrained=config.plan_llm)


def online_teacher(config: Stage2Config, plan: Plan, data: DataPlan) -> Optional[OnlinePlan]:
    """The teacher in the loop, if there is to be one."""
    if not config.online.enabled:
        return None
    if config.sentence_transformer is not None:
        plan.warnings.append('sentence_transformer: of teachers in the loop only LLMs are planned; what this one takes '
                             'comes on top')
        return None
    encoder = teacher_encoder(config)
    if config.teacher is not None and not Path(config.teacher).is_dir():
        plan.problems.append(f'teacher: online.enabled needs a teacher, and there is none in {config.teacher}')
    if encoder is None:
        return None
    if config.online.sharded:
        encoder = dataclasses.replace(encoder, dtype='float32')
    repeats = getattr(plan, 'steps', None) or 0
    per_image = config.train_data.captions_per_image
    tokens = count_tokens(plan, config, data, repeats * config.global_train_batch_size * per_image, encoder.max_length)
    return OnlinePlan(on_meta(encoder), tokens, config.online.batch_tokens, config.online.precision,
                      config.online.sharded, per_image)


class TextsPlan(NamedTuple):
    """Text encoders that are trained.

    Attributes:
        make: Tokens of each caption that the LLM reads -> the encoders, on the meta device, with what stands for
            tokenizers.
        width: Of the features of CLIP's text tower, if it takes the LLM's place.
        tokens: Of a caption, on average, that the LLM reads; 0 if none is trained.
        longest: How many it reads at most.
    """

    make: Callable[[int], TrainedTexts]
    width: Optional[int] = None
    tokens: int = 0
    longest: int = 0


def trained_texts(config: Stage2Config, plan: Plan, data: DataPlan) -> Optional[TextsPlan]:
    """The text encoders that the run trains, if it trains any.

    Raises:
        ConfigError: CLIP's text tower is none that could be trained, or the LLM is not known.
        LoadError: There is no such tower.
    """
    if not config.reads_captions:
        return None
    llm, longest, tokens = None, 0, 0
    if config.trained_text.lora is not None:
        llm = teacher_encoder(config)
        if llm is None:
            raise ConfigError(f'teacher: there is none in {config.teacher}, which trained_text.lora trains; plan_llm '
                              'lets it be planned before it is there')
        if not Path(config.teacher or '').is_dir():
            plan.problems.append(f'teacher: trained_text.lora needs one, and there is none in {config.teacher}')
        llm, longest = dataclasses.replace(llm, dtype='float32'), llm.max_length
        texts = (getattr(plan, 'steps', None) or 0) * config.global_train_batch_size
        tokens = count_tokens(plan, config, data, texts * config.train_data.captions_per_image, longest)
        plan.warnings.append(f'memory is that of captions as long as the LLM reads, {longest:,} tokens; the time is '
                             f'that of {tokens:,}, without the padding to the longest of a microbatch')

    def make(length: int) -> TrainedTexts:
        with torch.device('meta'):
            encoder, tower = load_trained_encoders(config, llm, on_meta=True, load_weights=False)
        return TrainedTexts(None if encoder is None else (encoder, partial(_tokens, length, _OF_LLM)),
                            None if tower is None else (tower, partial(
                                _tokens, tower.config.max_position_embeddings,
                                _OF_SIGLIP if 'siglip' in tower.config.model_type else _OF_CLIP)))

    tower = make(1).clip if config.without_llm else None
    return TextsPlan(make, None if tower is None else tower[0].width, tokens, longest)


def _tokens(length: int, names: Sequence[str], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a tokenizer would give."""
    return {name: torch.ones(len(texts), length, dtype=torch.long) for name in names}


def extracting_encoder(config: ExtractConfig) -> TextEncoderConfig:
    """The LLM that embeds captions.

    Raises:
        ConfigError: It is none that can be planned.
    """
    if (key := config.named_by()) in ('clip_text', 'sentence_transformer'):
        raise ConfigError(f'{key}: only the extraction of an LLM is planned, expected teacher or text_encoder')
    encoder = teacher_encoder(config)
    if encoder is None:
        raise ConfigError(f'teacher: there is none in {config.teacher}; plan_llm lets it be planned before it is there'
                          if config.teacher else 'a plan of an extraction needs teacher, a folder that stage 1 wrote, '
                                                 'or text_encoder')
    return encoder


def count_tokens(plan: Plan, config: PlanConfig, data: DataPlan, texts: int, longest: int) -> int:
    """Put texts and tokens into the plan; returns the tokens of one text on average."""
    tokens = config.plan_tokens
    if tokens is None and data.characters:
        tokens = round(data.characters / _CHARACTERS_PER_TOKEN) + 1
    if tokens is None:
        plan.warnings.append(f'every text is taken to have {longest:,} tokens, the most that the encoder reads; '
                             'plan_tokens says how many they have on average')
    tokens = min(tokens or longest, longest)
    plan.texts, plan.tokens = texts, texts * tokens
    return tokens
