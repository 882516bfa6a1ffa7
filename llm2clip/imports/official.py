# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An official checkpoint -> our model."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Union

from llm2clip.config import ConfigError, ModelConfig, VisionConfig
from llm2clip.files import read_json, reading
from llm2clip.imports.files import read_weights
from llm2clip.imports.layouts import adapter_shape, find_layout, from_official
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.folder import teacher_width

__all__ = ['Imported', 'check_teacher_width', 'import_checkpoint']


class Imported(NamedTuple):
    """A model from elsewhere."""

    model: LLM2CLIP
    """In evaluation mode."""
    config: ModelConfig
    llm_embed_dim: int


def import_checkpoint(checkpoint: Union[str, Path], vision: VisionConfig) -> Imported:
    """Read official weights; adapter and projection are what the file says, the tower is what `vision` says.

    Args:
        checkpoint: A file in one of the layouts, or a Hugging Face folder.
        vision: The tower.

    Raises:
        ConfigError: There are no such weights, they would run code, or they are not those of the tower: a name or a
            shape is wrong, or the folder's own configuration says otherwise.
    """
    state = read_weights(checkpoint, 'checkpoint')
    layout = find_layout(state)
    adapter, llm_embed_dim, embed_dim = adapter_shape(layout, state)
    if (path := Path(checkpoint, 'config.json')).is_file():
        vision = _with_architecture(vision, read_json(path, dict), path)
    config = ModelConfig(vision, adapter, embed_dim, layout.visual_projection,
                         logit_bias=0.0 if 'logit_bias' in state else None)
    model = LLM2CLIP(config, llm_embed_dim, load_weights=False)
    model.load_state_dict(from_official(layout, state, model.state_dict()))
    return Imported(model.eval(), config, llm_embed_dim)


def check_teacher_width(teacher: Union[str, Path], imported: Imported, key: str) -> None:
    """Raise a ConfigError, for the configuration's `key`, unless the vectors of the teacher in a folder fit."""
    if (width := teacher_width(teacher)) != imported.llm_embed_dim:
        raise ConfigError(f'{key}: the vectors of {teacher} have {width} dimensions, the adapter of the official '
                          f'weights takes {imported.llm_embed_dim}')


def _with_architecture(vision: VisionConfig, published: dict[str, Any], path: Path) -> VisionConfig:
    """The tower as the folder's config.json describes it, with what shapes do not tell: heads, activation, epsilon."""
    with reading(path, 'the vision_config of a CLIP'):
        fields = {'model_type': 'clip_vision_model', **published.get('vision_config', {})}
    for name, value in vision.architecture.items():
        if fields.setdefault(name, value) != value:
            raise ConfigError(f'vision.architecture.{name}: {value!r}, but {path} says {fields[name]!r}')
    return dataclasses.replace(vision, architecture=fields)
