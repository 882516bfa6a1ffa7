# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a sharded run holds in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.training import stage2
from llm2clip.training.trainer import initialize


@pytest.mark.usefixtures('no_leftovers')
def test_the_whole_weights_are_let_go_when_they_are_sharded(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model, whole = stage2.make_model, []

    def remember(*args: Any, **options: Any) -> torch.nn.Module:
        model = make_model(*args, **options)
        whole.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(stage2, 'make_model', remember)
    config = load_config(Stage2Config, [
        *stage2_args, 'train_data.num_workers=0', f'save_folder={tmp_path}/run', 'fsdp.state_dict_type=sharded'])
    initialize(config)
    gc.disable()
    try:
        trainer = stage2.make_trainer(config)
        kept = [ref for ref in whole if ref() is not None]
    finally:
        gc.enable()
    trainer.close()
    assert whole and not kept
