# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`import_official`."""

from dataclasses import dataclass
from typing import Literal, Optional

from omegaconf import MISSING

from llm2clip.config.models import VisionConfig
from llm2clip.config.ranges import ConfigError, Text
from llm2clip.config.teacher import ImportedTeacher

__all__ = ['ImportConfig']


@dataclass
class ImportConfig:
    """Official LLM2CLIP weights -> this project's folders: the model in `out`/llm2clip, a teacher in `out`/teacher."""

    checkpoint: Optional[Text] = None
    """Weights of the model: a file (`.pt`, `.safetensors`), or a Hugging Face folder.  Unset: the teacher alone."""
    vision: Optional[VisionConfig] = None
    """The tower of `checkpoint`.  A Hugging Face folder says the `architecture` itself."""
    teacher: ImportedTeacher = MISSING
    """The teacher that the model learned from: its folder, if it was imported before, or the LLM as it is published,
    and in `adapters` LLM2Vec's adapters if they are not merged."""
    template: Optional[Literal['llama3', 'chatml', 'none']] = None
    """What LLM2Vec puts around a caption: `llama3`, `chatml` or `none`.  Unset: by the LLM's name, as LLM2Vec does."""
    out: Text = MISSING
    """Folder that receives `llm2clip` (the model) and `teacher`."""

    def check(self) -> None:
        """Raise a ConfigError if there is a model without its tower."""
        if self.checkpoint is not None and self.vision is None:
            raise ConfigError('vision: required but not set, since checkpoint is')
