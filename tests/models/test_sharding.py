# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints hold trainable weights only, and one of another model is refused."""

from pathlib import Path

import pytest
import torch
from parts import text_encoder_from_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.models.caption_contrastive import CaptionContrastive


def _model(folder: Path, r: int = 4, learn_logit_scale: bool = True) -> CaptionContrastive:
    encoder, _ = text_encoder_from_config(TextEncoderConfig(pretrained=str(folder)), LoraConfig(r=r))
    return CaptionContrastive(encoder, learn_logit_scale=learn_logit_scale)


def test_a_state_dict_holds_the_trainable_weights(llm_folder: Path) -> None:
    model, other = _model(llm_folder), _model(llm_folder)
    state = get_model_state_dict(model)
    assert state.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert 'scale.logit_scale' in state and len(state) == 2 * 7 * 2 + 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    set_model_state_dict(other, get_model_state_dict(model), options=StateDictOptions(strict=False))
    for name, value in model.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], value)
    # Composer asks for all of it when it hands the weights of rank 0 to the other ranks.
    model.should_save_peft_only = False
    assert len(model.state_dict()) > len(state)


def test_a_checkpoint_of_another_model_is_refused(llm_folder: Path) -> None:
    model = _model(llm_folder)
    state = get_model_state_dict(model)
    lacking = {name: value for name, value in state.items() if name != 'scale.logit_scale'}
    for other, wrong, message in (
            (model, lacking, r"lacks \['scale\.logit_scale'\]"), (_model(llm_folder, r=2), state, 'size mismatch'),
            (_model(llm_folder, learn_logit_scale=False), state, r"has \['scale\.logit_scale'\]")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            other.load_state_dict(wrong, strict=False)
