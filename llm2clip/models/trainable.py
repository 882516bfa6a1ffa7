# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of models that are mostly frozen."""

from functools import partial
from typing import Any

import torch.nn as nn
from composer.models import ComposerModel

from llm2clip.models.sharding import own_name

__all__ = ['saves_trainable_only', 'save_trainable_only']


def save_trainable_only(model: ComposerModel, part: str = '') -> None:
    """Leave the frozen weights of a model, or of one of its parts, out of its state dict, and hence of checkpoints.

    They are those of a pretrained model, gigabytes that every checkpoint would repeat.  Load with ``strict=False``
    (`Trainer(load_strict_model_weights=False)`): a checkpoint that lacks another weight, or has an unknown one, is an
    error all the same.

    Args:
        model: Whatever else it is.
        part: Name of a child.
    """
    # Composer's own name; it turns it off while it hands the weights of rank 0 to the others.
    vars(model)['should_save_peft_only'] = True
    model.register_state_dict_post_hook(partial(_drop_frozen, part))
    model.register_load_state_dict_post_hook(partial(_check_loaded, part))


def saves_trainable_only(model: ComposerModel) -> bool:
    """Whether a model's state dict lacks weights."""
    return 'should_save_peft_only' in vars(model)


def _left_out(model: nn.Module, part: str, names: Any) -> set[str]:
    """Of these names, those of the part that are not trained."""
    trainable = {own_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    begin = f'{part}.' if part else ''
    return {name for name in names if own_name(name).startswith(begin) and own_name(name) not in trainable}


def _drop_frozen(part: str, model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not model.should_save_peft_only:
        return
    for name in _left_out(model, part, [name.removeprefix(prefix) for name in state if name.startswith(prefix)]):
        del state[prefix + name]


def _check_loaded(part: str, model: nn.Module, keys: Any) -> None:
    missing = sorted({*keys.missing_keys} - _left_out(model, part, keys.missing_keys))
    if missing or keys.unexpected_keys:
        raise ValueError(f'the checkpoint is of another model: it lacks {[*map(own_name, missing)][:3]} and has '
                         f'{list(keys.unexpected_keys)[:3]} besides')
