# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What is checked before a model is built, and the memory of a sharded run."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import stage2_arguments

from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.training import stage2
from llm2clip.training.trainer import check_metrics, initialize


@pytest.mark.usefixtures('no_leftovers')
def test_sharding_frees_the_whole_weights(
    image_dataset: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model, whole = stage2.make_model, []

    def remember(*args: Any, **options: Any) -> torch.nn.Module:
        model = make_model(*args, **options)
        whole.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(stage2, 'make_model', remember)
    config = load_config(Stage2Config, [
        *stage2_arguments(image_dataset, embeddings), f'save_folder={tmp_path}/run',
        'train_data.num_workers=0', 'fsdp.state_dict_type=sharded'])
    initialize(config)
    gc.disable()
    try:
        trainer = stage2.make_trainer(config)
        kept = [ref for ref in whole if ref() is not None]
    finally:
        gc.enable()
    trainer.close()
    assert whole and not kept


@pytest.mark.parametrize(('settings', 'key'), [
    ({'eval_first': True}, 'eval_first'),
    ({'callbacks': {'save_best': {}}}, 'callbacks.save_best.dataloader_label')])
def test_evaluations_need_data(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_metrics(Stage2Config(**settings), {})
    assert error.value.key == key
