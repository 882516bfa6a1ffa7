# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`export_hf`, `export_vision`, `export_sentence_transformers` and `import_official`."""

from dataclasses import dataclass
from typing import Literal, Optional

from omegaconf import MISSING

from llm2clip.config.models import VisionConfig
from llm2clip.config.ranges import ConfigError, Count, RunWeights, Share, Text
from llm2clip.config.teacher import ImportedTeacher, Teachers


@dataclass
class _OfRun:
    """What is exported of a run."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best`, as for `evaluate`."""
    wise_ft_alpha: Share = 1.0
    """Weights between those that the run began with (0) and ended with (1), as for `evaluate`."""


@dataclass
class ExportConfig(_OfRun):
    """Stage-2 run and teacher -> one Hugging Face folder."""

    truncate_dim: Optional[Count] = None
    """How many dimensions the features have, the first ones (see `loss.matryoshka_dims`).  Unset: all."""
    teacher: Teachers = None
    """As for stage 2; needed if the run's configuration does not name the teacher that it learned from."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher that the run's configuration names. Leave off unless you have read it."""
    out: Text = MISSING
    """The model goes to `out/llm2clip`."""


@dataclass
class ExportVisionConfig(_OfRun):
    """Stage-2 run -> its vision tower alone, as transformers or timm load it."""

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
    teacher: ImportedTeacher = MISSING
    """The teacher that the model learned from: its folder, if it was imported before, or the published LLM, with
    LLM2Vec's `adapters` if they are not merged."""
    template: Optional[Literal['llama3', 'chatml', 'none']] = None
    """What LLM2Vec puts around a caption: `llama3`, `chatml` or `none`.  Unset: by the LLM's name, as LLM2Vec does."""
    out: Text = MISSING
    """Folder that receives `llm2clip` (the model) and `teacher`."""

    def check(self) -> None:
        """Raise a ConfigError if there is a model without its tower."""
        if self.checkpoint is not None and self.vision is None:
            raise ConfigError('vision: required but not set, since checkpoint is')
