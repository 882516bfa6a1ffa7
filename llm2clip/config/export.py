# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`export_hf`, `export_vision` and `export_sentence_transformers`."""

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from llm2clip.config.ranges import Count, Repository, RunWeights, Share, Text
from llm2clip.config.teacher import Teachers

__all__ = ['ExportConfig', 'ExportTeacherConfig', 'ExportVisionConfig', 'HubConfig']


@dataclass
class HubConfig:
    """Where a finished folder is uploaded."""

    push_to_hub: Optional[Repository] = None
    """`owner/name` of a repository on the Hugging Face Hub.  The token is read from HF_TOKEN in the environment, and
    from nowhere else.  Unset: the folder is not uploaded."""
    private: bool = False
    """Make that repository a private one."""


@dataclass
class ExportConfig(HubConfig):
    """Stage-2 run and teacher -> one Hugging Face folder."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best`, as for `evaluate`."""
    interpolate: Share = 1.0
    """Weights between those that the run began with (0) and ended with (1), as for `evaluate`."""
    dim: Optional[Count] = None
    """How many dimensions the exported model's features have, the first ones (see `loss.dims`).  Unset: all."""
    teacher: Teachers = None
    """The teacher that the run learned from, or a list of several in the order of `train_data.teachers`, if the run's
    configuration does not name it: the folder that stage 1 wrote, or a mapping with the `type` of another."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher that the run's configuration names. Leave off unless you have read it."""
    out: Text = MISSING
    """The model goes to `out/llm2clip`."""
    remote_code: bool = False
    """Put the code into the folder that loads it, by `trust_remote_code=True`, where this package is not installed."""
    results: Optional[Text] = None
    """Folder that `evaluate` wrote about these weights; its numbers go into the model card."""


@dataclass
class ExportVisionConfig(HubConfig):
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
