# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of `extract_embeddings`, and of frozen text encoders (the key `teacher` of several
recipes)."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Optional, Union, get_args

from omegaconf import MISSING
from pydantic import ConfigDict, Discriminator, Field, Tag

from llm2clip.config.data import DatasetConfig
from llm2clip.config.models import PlanConfig, TextEncoderConfig, TextPlanConfig, VisionConfig
from llm2clip.config.ranges import (
    Count,
    DeviceName,
    FolderName,
    OutRemote,
    Storage,
    TeacherPrecision,
    Text,
)
from llm2clip.config.recipe import RecipeConfig
from llm2clip.errors import ConfigError


@dataclass
class LLMTeacherConfig(TextEncoderConfig):
    """An LLM that stage 1 did not train."""

    __pydantic_config__ = ConfigDict(extra='forbid')
    key: ClassVar[str] = 'teacher'
    pretrained: Text = field()
    type: Literal['llm'] = 'llm'


@dataclass
class SentenceTransformersTeacherConfig:
    """A sentence-transformers model."""

    __pydantic_config__ = ConfigDict(extra='forbid')
    name: Text
    """Folder or hub name of the model."""
    prompt_name: Optional[Text] = None
    """Name of one of the model's prompts, to put before every caption.
    Unset: the model's default prompt, if any."""
    prompt: Optional[str] = None
    """Text before every caption, instead of `prompt_name`, such as `'query: '`; `''` for none."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you have read that code."""
    type: Literal['sentence_transformers'] = 'sentence_transformers'


@dataclass
class ClipTextTeacherConfig:
    """Text tower of a CLIP or SigLIP model; its text features are the targets of `train_inheritance`.
    Captions beyond its maximum length are left out and counted."""

    __pydantic_config__ = ConfigDict(extra='forbid')
    name: Text
    """Hub name or folder of a CLIP or SigLIP model of transformers."""
    type: Literal['clip_text'] = 'clip_text'


def _teacher_tag(value: Any) -> Optional[str]:
    if isinstance(value, dict):
        return str(value.get('type'))
    return 'folder' if isinstance(value, str) else None


class _TeacherUnion:
    """Union of text encoders for pydantic: a folder, or a mapping by its `type`.  OmegaConf takes it for
    `Any`.  With `several`, None and lists of at least two are valid too."""

    def __init__(self, *types: Any, several: bool = False) -> None:
        self.types = {config.type: config for config in types}
        folder = Annotated[Text, Tag('folder')]
        configs = [Annotated[config, Tag(name)] for name, config in self.types.items()]
        teacher = Annotated[Union[(folder, *configs)], Discriminator(
            _teacher_tag, 'unknown_type',
            f'the folder of a teacher, or a mapping with the type {" or ".join(self.types)}')]
        self._union: Any = teacher
        if several:
            teachers = Annotated[list[teacher], Field(min_length=2)]
            self._union = Optional[Annotated[
                Union[Annotated[teacher, Tag('one')], Annotated[teachers, Tag('list')]],
                Discriminator(lambda value: 'list' if isinstance(value, list) else 'one')]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(self._union)


Teacher = Annotated[
    Any, _TeacherUnion(LLMTeacherConfig, SentenceTransformersTeacherConfig, ClipTextTeacherConfig)]
"""A folder, or a mapping of one of the types."""
Teachers = Annotated[Any, _TeacherUnion(LLMTeacherConfig, SentenceTransformersTeacherConfig, several=True)]
"""Teachers of a model: None, a folder, a mapping of a type that models can be trained on,
or a list of these."""
ImportedTeacher = Annotated[Any, _TeacherUnion(LLMTeacherConfig)]
"""A folder, or a mapping of type `llm`."""


def teacher_type(teacher: Any) -> str:
    """Return the `type` of a text encoder, or ``folder`` if it is a path; empty for none and for several."""
    return 'folder' if isinstance(teacher, str) else getattr(teacher, 'type', '')


def teacher_types(hint: Any) -> dict[str, Any]:
    """Type -> dataclass of each type that a field of text encoders takes; empty for other fields."""
    for annotation in get_args(hint)[1:]:
        if isinstance(annotation, _TeacherUnion):
            return annotation.types
    return {}


@dataclass
class EmbedConfig(RecipeConfig):
    """Datasets -> embeddings datasets."""

    uses_ranks = True
    resumes = True

    datasets: Annotated[dict[FolderName, DatasetConfig], Field(min_length=1)] = MISSING
    """Name -> image or caption dataset."""
    out: Text = MISSING
    """Folder of the embeddings datasets, each in `out/<name>`."""
    out_remote: Optional[OutRemote] = None
    """Remote folder for uploads to `out_remote/<name>`.  Nodes that do not share `out` need it."""
    storage: Storage = 'float16'
    """`float16`, `float32`, or `int8` with one float32 scale per vector, for half the size of `float16`."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""


@dataclass
class ExtractConfig(TextPlanConfig, EmbedConfig):
    """Captions of a dataset -> their embeddings by a frozen text encoder."""

    teacher: Teacher = MISSING
    """Folder written by stage 1 or `import_official`, or a mapping with the `type` of another text
    encoder."""
    batch_tokens: Count = 4096
    """Tokens per forward pass.  Padding counts, except for LLMs, which read packed texts."""
    plan_captions: Count = 1
    """Captions per image with `plan_samples`, as long as no dataset is on disk."""


@dataclass
class ExtractImagesConfig(PlanConfig, EmbedConfig):
    """Images of a dataset -> their embeddings by a frozen vision tower."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """The tower, with the same settings as `model.vision` of stage 2.  For the tower of a run, `name` is a
    folder that `export_vision` wrote."""
    batch_size: Count = 64
    """Images per forward pass."""
    num_workers: Count = 4
    """Threads per process that decode images."""

    def check(self) -> None:
        """Raise a ConfigError if the tower has weights that are to be trained."""
        if self.vision.lora is not None:
            raise ConfigError('expected none, since the tower is not trained; for the tower of a run, set '
                              'vision.name to the folder of export_vision', key='vision.lora')
