# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`export_hf`, `export_vision`, `export_sentence_transformers` and `import_official`."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from omegaconf import MISSING

from llm2clip.config.models import TextEncoderConfig, VisionConfig
from llm2clip.config.ranges import ConfigError, Count, RunWeights, Share, Text
from llm2clip.config.teacher import NamedTeacherConfig

__all__ = ['ExportConfig', 'ExportTeacherConfig', 'ExportVisionConfig', 'ImportConfig']


@dataclass
class ExportConfig(NamedTeacherConfig):
    """Stage-2 run and teacher -> one Hugging Face folder.  The teacher, the one that the run learned from, needs to be
    named only if the run's configuration does not."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best`, as for `evaluate`."""
    interpolate: Share = 1.0
    """Weights between those that the run began with (0) and ended with (1), as for `evaluate`."""
    dim: Optional[Count] = None
    """How many dimensions the exported model's features have, the first ones (see `loss.dims`).  Unset: all."""
    teachers: list[Text] = field(default_factory=list)
    """In place of `teacher`: those of `train_data.teachers`, in that order; their vectors are concatenated.  Each is a
    folder that stage 1 wrote, or a sentence-transformers model."""
    out: Text = MISSING
    """The model goes to `out/llm2clip`."""
    remote_code: bool = False
    """Put the code into the folder that loads it, by `trust_remote_code=True`, where this package is not installed."""


@dataclass
class ExportVisionConfig:
    """Stage-2 run -> its vision tower alone, as transformers or timm load it."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best`, as for `evaluate`."""
    interpolate: Share = 1.0
    """Weights between those that the run began with (0) and ended with (1), as for `evaluate`."""
    out: Text = MISSING
    """Folder that receives the tower."""
    projection: bool = True
    """Include the projection into the joint space, where the class has a place for one: CLIP's, and timm's."""


@dataclass
class ExportTeacherConfig:
    """Teacher -> one sentence-transformers folder."""

    teacher: Text = MISSING
    """Folder that stage 1 wrote."""
    out: Text = MISSING
    """Folder that receives the sentence-transformers model."""
    prompts: Optional[dict[str, str]] = None
    """Name -> instruction, for `encode(…, prompt_name=…)`.  Unset: `query`, the teacher's own instruction."""


@dataclass
class ImportConfig:
    """Official LLM2CLIP weights -> this project's folders: the model in `out`/llm2clip, a teacher in `out`/teacher."""

    checkpoint: Optional[Text] = None
    """Weights of the model: a file (`.pt`, `.safetensors`), or a Hugging Face folder.  Unset: the teacher alone."""
    vision: Optional[VisionConfig] = None
    """The tower of `checkpoint`.  A Hugging Face folder says the `architecture` itself."""
    teacher: Optional[Text] = None
    """Folder of the teacher that the model learned from, imported before."""
    text_encoder: Optional[TextEncoderConfig] = None
    """That teacher as it is published: an LLM, and in `adapters` LLM2Vec's adapters if they are not merged."""
    template: Optional[Literal['llama3', 'chatml', 'none']] = None
    """What LLM2Vec puts around a caption: `llama3`, `chatml` or `none`.  Unset: by the LLM's name, as LLM2Vec does."""
    out: Text = MISSING
    """Folder that receives `llm2clip` (the model) and `teacher`."""

    def check(self) -> None:
        """Raise a ConfigError if there is not one teacher, or a model without its tower."""
        if (self.teacher is None) == (self.text_encoder is None):
            raise ConfigError('teacher: expected either this (a folder of this project) or text_encoder (an official '
                              'LLM)')
        if self.checkpoint is not None and self.vision is None:
            raise ConfigError('vision: required but not set, since checkpoint is')
