# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A frozen teacher, and `extract_embeddings`."""

from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.data import DatasetConfig
from llm2clip.config.models import PlanConfig, TextEncoderConfig
from llm2clip.config.ranges import (
    ConfigError,
    Count,
    DeviceName,
    EngineName,
    FolderName,
    Positive,
    Remote,
    TeacherPrecision,
    Text,
)

__all__ = ['ExtractConfig', 'NamedTeacherConfig', 'TeacherConfig']

_KINDS = {'teacher': ' (a folder that stage 1 wrote)', 'text_encoder': ' (any LLM)', 'clip_text': '',
          'sentence_transformer': ''}


@dataclass
class NamedTeacherConfig:
    """Which frozen teacher of captions: one of `teacher`, `text_encoder` and `sentence_transformer`."""

    teacher: Optional[Text] = None
    """Folder that stage 1 wrote."""
    text_encoder: Optional[TextEncoderConfig] = None
    """In place of `teacher`, any LLM, not trained by stage 1."""
    sentence_transformer: Optional[Text] = None
    """In place of `teacher`, folder or hub name of a sentence-transformers model."""
    prompt_name: Optional[Text] = None
    """Name of one of that model's own prompts, which is put before every caption.  Unset: the model's default, if it
    has one."""
    prompt: Optional[str] = None
    """In place of `prompt_name`, the text that is put before every caption, such as `'query: '`; `''` for none."""
    trust_remote_code: bool = False
    """Run code that comes with the sentence-transformers model. Leave off unless you have read that code."""

    def check(self) -> None:
        """Raise a ConfigError if `named_by` does."""
        self.named_by()

    def named_by(self, required: bool = False) -> Optional[str]:
        """The key that names the teacher; None if none does.

        Raises:
            ConfigError: Several do, or none although one is `required`, or there are two prompts, or one without
                `sentence_transformer`.
        """
        kinds = {key: what for key, what in _KINDS.items() if hasattr(self, key)}
        named = [key for key in kinds if getattr(self, key) is not None]
        if len(named) > 1 or required and not named:
            *some, last = (key + what for key, what in kinds.items())
            raise ConfigError(f'expected one of {", ".join(some)} and {last}; got {" and ".join(named) or "none"}')
        prompts = [key for key in ('prompt_name', 'prompt') if getattr(self, key) is not None]
        if prompts and self.sentence_transformer is None:
            raise ConfigError(f'{prompts[0]}: {getattr(self, prompts[0])!r}, expected none without '
                              'sentence_transformer, whose prompt it would be')
        if len(prompts) > 1:
            raise ConfigError('prompt_name: expected either this or prompt, not both')
        return named[0] if named else None


@dataclass
class TeacherConfig(NamedTeacherConfig):
    """A frozen teacher of captions, and how it computes."""

    batch_tokens: Count = 4096
    """Tokens per forward pass; an LLM's texts are packed without padding, which counts with `sentence_transformer`."""
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
    out_remote: Optional[Remote] = None
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
    engine: EngineName = 'local'
    """`local`: the ranks of Composer's launcher share the shards. `ray`: the workers of a Ray cluster do, of which each
    holds the teacher on a GPU of its own, if the cluster has any."""
    worker_cpus: Count = 1
    """With `engine: ray`, CPUs of a worker, which computes on them if it has no GPU."""
