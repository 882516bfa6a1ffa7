# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A run with LoRA on its vision tower, from training to exports, which are of a plain tower."""

from pathlib import Path

import pytest
import timm
import torch
from composer.devices import DeviceCPU
from launched import SGD, assert_same_weights, losses, run, weights
from recipes_in_process import run_recipe

from llm2clip.config import EvaluatedModelConfig
from llm2clip.evaluation.evaluated_models import load_evaluated_model
from llm2clip.export.hf import LLM2CLIPModel
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.training.runs import Stage2Run


@pytest.mark.dist
def test_lora_trains_sharded_resumes_and_is_merged(
    stage2_args: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pretrained = timm.create_model('test_vit', img_size=32).state_dict()
    torch.save(pretrained, tmp_path / 'vit.pth')
    args = [*stage2_args, *SGD, f'teacher={teacher_folder}', 'layer_decay=0.9', 'optimizer.weight_decay=0.01',
            f'model.vision={{name: test_vit, image_size: 32, checkpoint: {tmp_path}/vit.pth, lora: {{r: 4}}}}',
            'model.vision.lora.lora_dropout=0.0']
    one, two, export = tmp_path / 'one', tmp_path / 'two', tmp_path / 'export/llm2clip'
    run('train_stage2', one, args)
    cached = ['algorithms.grad_cache={}', 'device_train_microbatch_size=3']
    for steps, more in ((3, ['fsdp={state_dict_type: full, activation_checkpointing: true}']), (6, [])):  # then DDP
        run('train_stage2', two, [*args, *cached, *more, f'max_duration={steps}ba'], 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len({*losses(one).values()}) == 6
    assert_same_weights(weights(two), weights(one))
    state = {name.removeprefix('model.'): value for name, value in weights(one).items()}
    assert all(value.any() for name, value in state.items() if 'lora_B' in name)
    own = {name: value for name, value in pretrained.items() if not name.startswith('head.')}
    for name, value in state.items():
        if name.startswith('vision_encoder.trunk.') and 'lora_' not in name:
            assert value.equal(own[name.removeprefix('vision_encoder.trunk.').replace('.base_layer', '')])

    trained = Stage2Run(one)
    unmerged = LLM2CLIP(trained.config.model, 32, False).eval()
    unmerged.load_state_dict(state)
    model = trained.load_model()
    assert not any('lora' in name for name in model.state_dict())
    run_recipe(monkeypatch, 'export_hf', f'run={one}', f'out={tmp_path}/export')
    run_recipe(monkeypatch, 'export_vision', f'run={one}', f'out={tmp_path}/vision', 'projection=false')
    evaluated = load_evaluated_model(EvaluatedModelConfig(run=str(one)), tmp_path / 'cache', DeviceCPU())
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected, tower = unmerged.get_image_features(pixels), unmerged.vision_encoder(pixels)
        for found in (model.get_image_features(pixels), LLM2CLIPModel.from_pretrained(export).get_image_features(
                pixel_values=pixels), evaluated.image_features(pixels)[0]):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        of_timm = timm.create_model(f'local-dir:{tmp_path}/vision', pretrained=True).eval()
        torch.testing.assert_close(of_timm(pixels), tower, rtol=1e-5, atol=1e-5)

    # WiSE-FT goes back to the weights of the file, and another run with LoRA begins with the merged ones.
    back = Stage2Run(one, wise_ft_alpha=0.0).load_model().vision_encoder.trunk.state_dict()
    assert all(value.equal(own[name]) for name, value in back.items()) and back.keys() == own.keys()
    run_recipe(monkeypatch, 'train_stage2', *args, f'initial_weights={export}', f'save_folder={tmp_path}/again',
               'max_duration=1ba', 'optimizer.lr=0.0', 'train_data.num_workers=0')
    assert_same_weights(Stage2Run(tmp_path / 'again').load_model().state_dict(), model.state_dict())
