# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The weights of an exported folder as the beginning of a training."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

from llm2clip.config import ConfigError, ModelConfig
from llm2clip.export.hf import LLM2CLIPConfig, is_exported
from llm2clip.files import reading
from llm2clip.imports.official import read_weights
from llm2clip.models.llm2clip import LLM2CLIP, projection_kind
from llm2clip.remote_code.checks_llm2clip import check_keys, check_weight_files
from llm2clip.teacher.fingerprint import Fingerprint

__all__ = ['check_initial_weights', 'load_initial_weights']

# Of a transformers architecture, what does not change the features.
_IRRELEVANT = ('transformers_version', 'dtype', 'torch_dtype', 'architectures', 'projection_dim', 'dropout',
               'attention_dropout', 'initializer_factor', 'initializer_range')


def load_initial_weights(
    model: LLM2CLIP, config: ModelConfig, teacher: Fingerprint, folder: Union[str, Path]
) -> bool:
    """Load an exported model's weights into one of the same configuration.

    Args:
        model: Any weights.
        config: The model's.
        teacher: The one that training uses; a warning says if it is another than the exported
            model's, whose adapter then has to learn anew.
        folder: What `export_folder` wrote.

    Returns:
        Whether the teacher is that of the exported model.

    Raises:
        ConfigError: There is no exported model, or it is of another configuration.
        FileError, LoadError: Its weights are damaged, or not those of this model.
    """
    exported = check_initial_weights(model, config, folder)
    check_weight_files(Path(folder))
    state = {name.removeprefix('model.'): value for name, value in read_weights(folder, 'initial_weights').items()}
    check_keys(state, model.state_dict(), f'initial_weights: {folder}')
    model.load_state_dict(state)
    with reading(Path(folder, 'config.json'), 'the fingerprint of a teacher under the key learned_from'):
        if exported.learned_from and teacher == Fingerprint.from_json(exported.learned_from):
            return True
    try:
        teacher.check(exported.teachers(), 'training', f'the model in {folder}')
    except ValueError as error:
        warnings.warn(f'initial_weights: {error}', stacklevel=2)
        return False
    return True


def check_initial_weights(model: LLM2CLIP, config: ModelConfig, folder: Union[str, Path]) -> LLM2CLIPConfig:
    """The exported model's configuration, which must be that of `model`; its weights are not read.

    Raises:
        ConfigError: There is no exported model, or a key differs.
    """
    if not is_exported(folder):
        raise ConfigError(f'initial_weights: {folder} is no exported folder: it has no config.json of one')
    exported = LLM2CLIPConfig.from_pretrained(folder)
    exported.teachers()
    wrong = [f'model.{key}: {found!r}, but {expected!r} there'
             for key, found, expected in _differences(model, config, exported.model_config())]
    if wrong:
        raise ConfigError(f'initial_weights: the model in {folder} is another one: {"; ".join(wrong)}')
    return exported


def _differences(model: LLM2CLIP, config: ModelConfig, exported: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key, value here and value there, of all that decides what weights mean."""
    ours, theirs = config.vision, exported.vision
    preprocessing, architecture = model.vision_encoder.preprocessing, model.vision_encoder.tower.architecture()
    pairs: dict[str, tuple[Any, Any]] = {
        'vision.image_size': (ours.image_size, theirs.image_size),
        'vision.mean': (list(preprocessing.mean), theirs.mean),
        'vision.std': (list(preprocessing.std), theirs.std),
        'embed_dim': (config.embed_dim, exported.embed_dim),
        'visual_projection': (projection_kind(model.visual_projection), exported.visual_projection),
        'logit_bias': (config.logit_bias is not None, exported.logit_bias is not None),
    }
    if not architecture or not theirs.architecture:
        # timm's name says everything but which weights came first, after the point.
        pairs['vision.name'] = ours.name.split('.')[0], theirs.name.split('.')[0]
    for name in sorted({*architecture, *theirs.architecture} - {*_IRRELEVANT}):
        pairs[f'vision.architecture.{name}'] = architecture.get(name), theirs.architecture.get(name)
    for name, value in dataclasses.asdict(config.adapter).items():
        pairs[f'adapter.{name}'] = value, getattr(exported.adapter, name)
    return ((key, *pair) for key, pair in pairs.items() if pair[0] != pair[1])
