# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Weights of a run, and weights between those that it began with and those that it ended with."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from composer.devices import DeviceCPU
from launched import stage2_arguments
from recipes_in_process import run_recipe
from refusals import refused_at
from small_training import train
from trained import save_run_config

from llm2clip.config import AdapterConfig, EvaluatedModelConfig, ModelConfig, VisionConfig
from llm2clip.evaluation.evaluated_models import load_evaluated_model
from llm2clip.export.hf import LLM2CLIPModel, export_folder
from llm2clip.io.tensors import write_safetensors
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.training.checkpoints import read_latest
from llm2clip.training.runs import BEST_FILE, Stage2Run, load_checkpoint_model

TOWER = 'test_efficientnet'
CONFIG = ModelConfig(VisionConfig(TOWER, False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
Weights = dict[str, torch.Tensor]


def _model(seed: int) -> LLM2CLIP:
    """With random weights everywhere, also where they begin alike."""
    torch.manual_seed(seed)
    model = LLM2CLIP(CONFIG, 32)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape))
    return model.eval()


def _save_run(folder: Path, weights: Weights, teacher: Path, vision: dict[str, Any], **options: Any) -> Path:
    """A run that kept its best weights."""
    model = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **vision))
    save_run_config(folder, model, teacher=str(teacher), **options)
    TeacherRecord(teacher_fingerprint(teacher), {'llm_embed_dim': 32}).write(folder)
    write_safetensors(folder / BEST_FILE, {f'model.{name}': value for name, value in weights.items()})
    return folder


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A timm file, whose BatchNorms have seen data."""
    torch.manual_seed(1)
    model = timm.create_model(TOWER)
    model(torch.randn(8, 3, 32, 32))
    torch.save(model.state_dict(), tmp_path / 'tower.pth')
    return tmp_path / 'tower.pth'


def _assert_mean(found: Weights, initial: Weights, trained: Weights, share: float) -> None:
    assert found.keys() == trained.keys() and initial.keys() <= trained.keys()
    for name, value in trained.items():
        if name in initial and value.is_floating_point():
            value = (1 - share) * initial[name] + share * value
        exact = {'rtol': 0, 'atol': 0} if share in (0, 1) else {}
        torch.testing.assert_close(found[name], value, msg=name, **exact)


def test_only_the_tower_is_interpolated_from_a_checkpoint(tower: Path, teacher_folder: Path, tmp_path: Path) -> None:
    trained = _model(2).state_dict()
    run = _save_run(tmp_path / 'run', trained, teacher_folder, {'checkpoint': str(tower)})
    initial = {f'vision_encoder.trunk.{name}': value for name, value in torch.load(tower).items()
               if not name.startswith('classifier.')}
    for share in (0.0, 0.3, 1.0):
        _assert_mean(Stage2Run(run, 'best', share).load_model().state_dict(), initial, trained, share)


@pytest.mark.parametrize('same_teacher', [True, False])
def test_interpolation_skips_an_adapter_of_another_teacher(
    same_teacher: bool, teacher_folder: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    first, trained = _model(1), _model(2).state_dict()
    teacher = teacher_folder if same_teacher else causal_teacher
    export_folder(first, CONFIG, TeacherRecord(teacher_fingerprint(teacher), {'llm_embed_dim': 32}), [teacher],
                  tmp_path / 'first')
    run = _save_run(tmp_path / 'run', trained, teacher_folder, {}, initial_weights=str(tmp_path / 'first'))
    initial = {name: value for name, value in first.state_dict().items()
               if same_teacher or not name.startswith('adapter.')}
    with warnings.catch_warnings(record=True):
        for share in (0.0, 0.75):
            _assert_mean(Stage2Run(run, 'best', share).load_model().state_dict(), initial, trained, share)


@pytest.mark.parametrize(('vision', 'options'), [
    ({}, {}), ({'checkpoint': '/gone.pth'}, {}), ({}, {'initial_weights': '/gone'}), ({'pretrained': True}, {})],
    ids=['random', 'checkpoint', 'initial weights', 'pretrained'])
def test_missing_initial_weights_are_refused(
    vision: dict[str, Any], options: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    run = _save_run(tmp_path / 'run', _model(2).state_dict(), teacher_folder, vision, **options)
    assert Stage2Run(run, 'best', 1.0).load_model()
    with refused_at('wise_ft_alpha'):
        Stage2Run(run, 'best', 0.5).load_model()


def test_a_training_begins_with_the_weights_of_a_run(
    image_dataset: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / 'first', tmp_path / 'second'
    args = (*stage2_arguments(image_dataset, embeddings), 'max_duration=1ba', 'train_data.num_workers=0')
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={first}', 'model.vision.lora={}')
    trained = Stage2Run(first).load_model().state_dict()
    args = (*args, f'initial_weights={first}', f'save_folder={second}')
    run_recipe(monkeypatch, 'train_stage2', *args, 'optimizer={name: sgd, lr: 0.0}', 'model.vision.freeze=true')
    begun = Stage2Run(second)
    weights, initial = begun.load_model().state_dict(), begun.initial_state()
    assert weights.keys() == trained.keys() == initial.keys()
    assert all(torch.equal(weights[name], value) and torch.equal(initial[name], value)
               for name, value in trained.items())
    for setting, difference in (('model.embed_dim=24', 'model.embed_dim is 16, expected 24'),
                                ('model.vision.feature_levels=1', 'model.vision.feature_levels is 0, expected 1')):
        with refused_at('initial_weights', difference):
            run_recipe(monkeypatch, 'train_stage2', *args, setting, f'save_folder={tmp_path}/third')


def test_a_run_is_read_where_its_settings_say(tmp_path: Path) -> None:
    """Checkpoints that a run wrote before its `checkpoint_folder` changed are not read; a run that was moved is."""
    run, moved = tmp_path / 'run', tmp_path / 'moved'
    train(run / 'checkpoints', steps=1)
    train(tmp_path / 'elsewhere', steps=2)
    for folder, expected in (('elsewhere', 'elsewhere'), ('run/checkpoints', 'moved/checkpoints')):
        (run / 'config.yaml').write_text(f'save_folder: {run}\ncheckpoint_folder: {tmp_path}/{folder}\n')
        if expected != folder:
            run = run.rename(moved)
        found, weights = load_checkpoint_model(run), read_latest(f'{tmp_path}/{expected}')
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_evaluations_and_exports_interpolate(
    tower: Path, teacher_folder: Path, image_dataset: Path, embeddings: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really trained, from a file with other names."""
    torch.save({f'_{i}': value for i, value in enumerate(torch.load(tower).values())}, tower)
    run = tmp_path / 'run'
    run_recipe(monkeypatch, 'train_stage2', *stage2_arguments(image_dataset, embeddings), f'save_folder={run}',
               'max_duration=3ba', 'optimizer={name: sgd, lr: 0.5}',
               f'teacher={teacher_folder}', f'model.vision={{name: {TOWER}, checkpoint: {tower}, remap: true}}')
    ends = [Stage2Run(run, 'latest', share).load_model().state_dict() for share in (0.0, 1.0)]
    running = 'vision_encoder.trunk.bn1.running_mean'
    torch.testing.assert_close(ends[0][running], ends[1][running], rtol=1e-6, atol=0)
    assert ends[0][running].abs().max() > 0
    assert not torch.equal(*(end['vision_encoder.trunk.conv_stem.weight'] for end in ends))
    middle = Stage2Run(run, 'latest', 0.5).load_model()
    _assert_mean(middle.state_dict(), *ends, 0.5)
    run_recipe(monkeypatch, 'export_hf', f'run={run}', f'out={tmp_path}/export', 'wise_ft_alpha=0.5')
    exported = LLM2CLIPModel.from_pretrained(tmp_path / 'export/llm2clip')
    evaluated = load_evaluated_model(EvaluatedModelConfig(run=str(run), wise_ft_alpha=0.5), tmp_path / 'cache',
                                     DeviceCPU())
    for found in (exported.model, evaluated.model):
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in middle.state_dict().items())
    card = (tmp_path / 'export/llm2clip/README.md').read_text()
    assert '| weights | of the vision tower 0.5 · initial + 0.5 · trained ([WiSE-FT]' in card
    run_recipe(monkeypatch, 'export_vision', f'run={run}', f'out={tmp_path}/vision', 'wise_ft_alpha=0')
    vision = timm.create_model(f'local-dir:{tmp_path}/vision', pretrained=True)
    assert torch.equal(vision.conv_stem.weight, ends[0]['vision_encoder.trunk.conv_stem.weight'])
    assert '0 · initial' not in (card := (tmp_path / 'vision/README.md').read_text()) and '1 · initial + 0 ·' in card
