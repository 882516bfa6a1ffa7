# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The LLM of a plan: a teacher's folder, an LLM's own files, or its architecture alone."""

import dataclasses
from pathlib import Path
from typing import Optional, Union

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

__all__ = ['count_tokens', 'described', 'extracting_encoder', 'on_meta', 'online_teacher', 'teacher_encoder']

_CHARACTERS_PER_TOKEN = 4
_Config = Union[ExtractConfig, InheritanceConfig, Stage2Config]


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
