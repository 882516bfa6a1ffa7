# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Weights between those that a run began with and those that it ended with (WiSE-FT, arXiv 2109.01903, section 3).

A tower that was fine-tuned knows more of the new data and less of what it could do before.  The mean of both weights
often keeps most of either.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from llm2clip.config import ConfigError, Stage2Config
from llm2clip.imports.initial import check_is_exported, load_initial_weights
from llm2clip.models.adapter import load_adapter
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.fingerprint import TeacherRecord

__all__ = ['check_initial', 'initial_state', 'interpolated']


def interpolated(
    initial: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """``(1 - share) * initial + share * trained``, which is exact at both ends.

    Args:
        initial: Name -> weight at the beginning, of some of the weights.
        trained: Name -> weight at the end, of all.  What has no initial weight stays as it is, and so do integers.  The
            statistics of BatchNorms are averaged as weights are, which changes nothing where they were frozen.
        share: From 0, the initial weights, to 1, the trained ones.

    Returns:
        Name -> weight, of all.
    """
    return {name: torch.lerp(initial[name].to(value), value, share)
            if name in initial and value.is_floating_point() else value for name, value in trained.items()}


def check_initial(config: Stage2Config) -> None:
    """Find out what is wrong with a run's initial weights without reading them.

    Raises:
        ConfigError: The tower began with random weights, or a file or folder is not there any more; names the key.
    """
    vision = config.model.vision
    if config.initial_weights is not None:
        check_is_exported(config.initial_weights)
    elif vision.checkpoint is not None:
        if not Path(vision.checkpoint).is_file():
            raise ConfigError(f'model.vision.checkpoint: there is no file {vision.checkpoint}')
    elif not vision.pretrained:
        raise ConfigError('the tower began with random weights, since model.vision.pretrained is false')


def initial_state(config: Stage2Config, record: TeacherRecord) -> dict[str, torch.Tensor]:
    """What a run began with: name -> weight, of all weights that meant something before the training.

    These are the vision tower's, as their file has them.  Projection and adapter begin at random, unless the first is
    the tower's own and the second that of `initial_adapter`.  With `initial_weights`, they and the temperature have
    initial weights too, except an adapter whose teacher was another.

    Args:
        config: The run's.
        record: Of the teacher that it learned from.

    Raises:
        ConfigError, FileError, LoadError: As when the run began: what it began with is not there, damaged or of another
            model.
    """
    check_initial(config)
    model = LLM2CLIP(config.model, record.llm_embed_dim, load_weights=config.initial_weights is None)
    if config.initial_weights is None:
        known = ['vision_encoder']
        if config.model.visual_projection == 'pretrained':
            known.append('visual_projection')
        if config.initial_adapter is not None:
            load_adapter(model.adapter, config.model.adapter, config.model.embed_dim, record.teacher,
                         config.initial_adapter, 'initial_adapter')
            known.append('adapter')
        return {name: value for name, value in model.state_dict().items() if name.split('.')[0] in known}
    same_teacher = load_initial_weights(model, config.model, record.teacher, config.initial_weights)
    return {name: value for name, value in model.state_dict().items()
            if same_teacher or not name.startswith('adapter.')}
