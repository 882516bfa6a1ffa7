# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of models that are mostly frozen."""

from typing import Any

import torch.nn as nn
from composer.models import ComposerModel

from llm2clip.models.sharding import own_name

__all__ = ['TrainableStateModel']


class TrainableStateModel(ComposerModel):
    """A Composer model whose state dict, and hence whose checkpoints, hold its trainable weights only.

    The frozen ones are those of the pretrained model, gigabytes that every checkpoint would repeat.  Load with
    ``strict=False`` (`Trainer(load_strict_model_weights=False)`): a checkpoint that lacks a trainable weight, or has an
    unknown one, is an error all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        # Composer's own name; it turns it off while it hands the weights of rank 0 to the others.
        self.should_save_peft_only = True
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_check_loaded)


def _trainable(model: nn.Module) -> set[str]:
    return {own_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _drop_frozen(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not model.should_save_peft_only:
        return
    keep = _trainable(model)
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in keep:
            del state[name]


def _check_loaded(model: nn.Module, keys: Any) -> None:
    missing = sorted(_trainable(model) & set(map(own_name, keys.missing_keys)))
    if missing or keys.unexpected_keys:
        raise ValueError(f'the checkpoint is of another model: it lacks {missing[:3]} and has '
                         f'{list(keys.unexpected_keys)[:3]} besides')
