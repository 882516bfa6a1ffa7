# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which text encoders of a run are tested: the LLM, CLIP's own text tower that the run has trained, or both."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from llm2clip.config import AdapterConfig, ConfigError, EvaluatedModelConfig, ModelConfig, Stage2Config
from llm2clip.models.joint import BothTexts, ConcatenatedTexts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.remote_code.checks_llm2clip import check_keys
from llm2clip.teacher.clip_text import MORE_FILE
from llm2clip.weights import read_safetensors

__all__ = ['side_by_side', 'take_clip_text', 'text_side']

Teacher = Callable[[Sequence[str]], tuple[torch.Tensor, int]]


def text_side(config: EvaluatedModelConfig, run: Stage2Config, key: str) -> str:
    """``llm``, ``clip`` or ``both``.

    Args:
        config: What is evaluated.
        run: Configuration of its run.
        key: Where the model stands in the configuration.

    Raises:
        ConfigError: The run has not the text encoders that are asked for.
    """
    if (method := run.trained_text.method) is None:
        able = ['clip'] if run.without_llm else ['llm']
    else:
        able = ['both', 'llm', 'clip'] if method == 'd' else ['llm', 'clip']
    if config.text not in (None, *able):
        raise ConfigError(f'{key}.text: {config.text!r}, expected {" or ".join(able)}, as trained_text of the run in '
                          f'{config.run} says')
    return config.text or able[0]


def take_clip_text(
    model: LLM2CLIP, config: ModelConfig, folder: Path, llm_embed_dim: int, both: bool
) -> ModelConfig:
    """Let a model take the vectors of CLIP's text tower, which was trained beside the LLM.

    Args:
        model: As it takes the LLM's; changed in place.
        config: Its configuration.
        folder: Of the text tower.
        llm_embed_dim: Width of the LLM's vectors.
        both: After those of the LLM; otherwise in their place.

    Returns:
        Its configuration from now on.

    Raises:
        FileError, LoadError: The projection of both is damaged or missing.
    """
    if not both:
        model.adapter = nn.Identity()
        return dataclasses.replace(config, adapter=AdapterConfig('identity'))
    concatenated = ConcatenatedTexts(config.embed_dim)
    found = read_safetensors(folder / MORE_FILE, "the projection of both text encoders' features").tensors
    state = {name.removeprefix('concatenated.'): value for name, value in found.items()}
    check_keys(state, concatenated.state_dict(), folder / MORE_FILE)
    concatenated.load_state_dict(state)
    model.adapter = BothTexts(model.adapter, concatenated, llm_embed_dim).eval()
    return config


def side_by_side(llm: Teacher, clip: Teacher) -> Teacher:
    """Texts -> the vectors of both, one after the other, and how many lost their end."""
    def vectors_of_both(texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        found = llm(texts), clip(texts)
        return torch.cat([vectors for vectors, _ in found], dim=-1), max(truncated for _, truncated in found)

    return vectors_of_both
