# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of `export_hf`, `export_vision`, `export_sentence_transformers` and `import_official`."""

from dataclasses import dataclass
from typing import Literal, Optional

from omegaconf import MISSING

from llm2clip.config.models import VisionConfig
from llm2clip.config.ranges import Count, RunWeights, Share, Text
from llm2clip.config.recipe import Output, RecipeConfig
from llm2clip.config.teacher import ImportedTeacher, Teachers
from llm2clip.errors import refuse


@dataclass
class _RunWeightsConfig(RecipeConfig):
    """Weights of a run to export."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best` weights, as for `evaluate`."""
    wise_ft_alpha: Share = 1.0
    """Interpolation between the initial (0) and the trained (1) weights of the run, as for `evaluate`."""


@dataclass
class ExportConfig(_RunWeightsConfig):
    """Stage-2 run and teacher -> one Hugging Face folder."""

    repeats = True

    truncate_dim: Optional[Count] = None
    """Number of feature dimensions to keep, from the first on (see `loss.matryoshka_dims`).  Unset: all."""
    teacher: Teachers = None
    """Teacher of the model, as for stage 2.  Needed if the configuration of the run names none."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher that the run names. Leave off unless you have read that code."""
    out: Text = MISSING
    """Folder that receives the model in `llm2clip/`."""


@dataclass
class ExportVisionConfig(_RunWeightsConfig):
    """Stage-2 run -> its vision tower alone, for transformers or timm."""

    records_duration = False

    out: Text = MISSING
    """Folder that receives the tower."""
    projection: bool = True
    """Include the projection to the joint space, if the class of the tower has one (CLIP, timm)."""

    def outputs(self) -> list[Output]:
        return [Output(self.out, is_replaced=True)]


@dataclass
class ExportTeacherConfig(RecipeConfig):
    """Teacher -> one sentence-transformers folder."""

    records_duration = False

    teacher: Text = MISSING
    """Folder written by stage 1."""
    out: Text = MISSING
    """Folder that receives the sentence-transformers model."""
    prompts: Optional[dict[str, str]] = None
    """Name -> instruction for `encode(…, prompt_name=…)`.  Unset: `query`, the teacher's own instruction."""

    def outputs(self) -> list[Output]:
        return [Output(self.out, is_replaced=True)]


@dataclass
class ImportConfig(RecipeConfig):
    """Official LLM2CLIP weights -> a model in `out`/llm2clip and a teacher in `out`/teacher."""

    checkpoint: Optional[Text] = None
    """Weights of the model: a file (`.pt`, `.safetensors`) or a Hugging Face folder.
    Unset: only the teacher."""
    vision: Optional[VisionConfig] = None
    """Vision tower of `checkpoint`.  A Hugging Face folder defines the `architecture` itself."""
    teacher: ImportedTeacher = MISSING
    """Teacher that the model was trained with: the folder of an earlier import, or the published LLM, with
    LLM2Vec's `adapters` if they are not merged."""
    template: Optional[Literal['llama3', 'chatml', 'none']] = None
    """Template of LLM2Vec around a caption: `llama3`, `chatml` or `none`.
    Unset: by the LLM's name, as in LLM2Vec."""
    out: Text = MISSING
    """Folder that receives `llm2clip` (the model) and `teacher`."""

    def check(self) -> None:
        """Raise a ConfigError if `checkpoint` is set without `vision`, or the tower has LoRA."""
        refuse([
            ('vision', self.checkpoint is not None and self.vision is None,
             'required but not set, since checkpoint is'),
            ('vision.lora', self.vision is not None and self.vision.lora is not None,
             'the weights to import have none; expected it unset'),
        ])
