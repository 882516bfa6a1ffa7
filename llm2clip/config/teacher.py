# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A frozen teacher, and `extract_embeddings`."""

from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.data import DatasetConfig
from llm2clip.config.models import TextEncoderConfig
from llm2clip.config.planning import PlanConfig
from llm2clip.config.ranges import Count, DeviceName, FolderName, Positive, TeacherPrecision, Text

__all__ = ['ExtractConfig', 'TeacherConfig']


@dataclass
class TeacherConfig:
    """A frozen teacher of captions: one of `teacher`, `text_encoder` and `sentence_transformer`."""

    teacher: Optional[Text] = None
    """Folder that stage 1 wrote."""
    text_encoder: Optional[TextEncoderConfig] = None
    """Any LLM, not trained by stage 1."""
    sentence_transformer: Optional[Text] = None
    """Folder or hub name of a sentence-transformers model."""
    trust_remote_code: bool = False
    """Run code that comes with the sentence-transformers model. Leave off unless you have read that code."""
    batch_tokens: Count = 4096
    """Tokens per forward pass; texts are packed without padding."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""


@dataclass
class ExtractConfig(PlanConfig, TeacherConfig):
    """Captions of an image MDS -> their embeddings by a frozen teacher."""

    clip_text: Optional[Text] = None
    """In place of a teacher, hub name or folder of a CLIP or SigLIP: the vectors are its own text features, the targets
    of `train_inheritance`.  Captions that it cannot read to their end are left out and counted."""
    datasets: Annotated[dict[FolderName, DatasetConfig], Field(min_length=1)] = MISSING
    """Name -> image or caption dataset."""
    out: Text = MISSING
    """Sidecars go to `out/<name>`."""
    out_remote: Optional[Text] = None
    """Place to which the sidecars are uploaded, to `out_remote/<name>`; nodes that do not share `out` need it."""
    storage: Literal['float16', 'int8'] = 'float16'
    """`float16`, or `int8` with one float32 scale per vector, half the size."""
    normalize: bool = False
    """Store vectors of length 1.  The adapter of stage 2 normalises them in any case, unless `adapter.normalize` is
    false."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
    dist_timeout: Positive = 3600.0
    """Seconds that ranks wait for the one with the most work at the end."""
