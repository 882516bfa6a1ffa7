# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A training that begins with exported weights, and models that these do not fit."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import edited
from launched import stage2_arguments
from official_parts import HALF
from recipes_in_process import run_recipe
from safetensors.torch import load_file, save_file

from llm2clip.config import AdapterConfig, LLMTeacherConfig, ModelConfig, VisionConfig
from llm2clip.conversion.official_weights import load_initial_weights
from llm2clip.errors import ConfigError, FileError
from llm2clip.export.hf import LLM2CLIPModel, export_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.teacher.sources import FrozenLLM
from llm2clip.training.runs import Stage2Run

CONFIG = ModelConfig(VisionConfig('test_efficientnet.r160_in1k', False, image_size=32),
                     AdapterConfig(depth=1), embed_dim=16)
SMALL = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2,
         'patch_size': 8, 'image_size': 32}
CLIP = ModelConfig(VisionConfig('a folder', architecture={'model_type': 'clip_vision_model', **SMALL}, image_size=32,
                                **HALF), AdapterConfig(depth=1), embed_dim=16)


def _export(config: ModelConfig, teacher: Path, out: Path) -> Path:
    torch.manual_seed(5)
    model = LLM2CLIP(config, 32, load_weights=False).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    record = TeacherRecord(teacher_fingerprint(teacher), {'llm_embed_dim': 32})
    export_folder(model, config, record, teacher, out)
    return out


@pytest.fixture(scope='module')
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(CONFIG, teacher_folder, tmp_path_factory.mktemp('exported') / 'llm2clip')


@pytest.fixture(scope='module')
def exported_clip(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(CLIP, teacher_folder, tmp_path_factory.mktemp('exported') / 'clip')


def _load(config: ModelConfig, folder: Path, llm_embed_dim: int = 32) -> LLM2CLIP:
    torch.manual_seed(6)
    model = LLM2CLIP(config, llm_embed_dim, load_weights=False)
    load_initial_weights(model, config, Fingerprint(({},)), folder)
    return model


def test_training_begins_with_them(
    exported: Path, image_dataset: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder
) -> None:
    # `pretrained` would ask the hub, if the tower's own weights were loaded first.
    run_recipe(monkeypatch, 'train_stage2', *stage2_arguments(image_dataset, embeddings), 'max_duration=1ba',
               'optimizer={name: sgd, lr: 0.0}', 'model.vision.pretrained=true', f'save_folder={tmp_path}/run',
               f'initial_weights={exported}', 'train_data.num_workers=0')
    trained = Stage2Run(tmp_path / 'run').load_model().state_dict()
    expected = load_file(exported / 'model.safetensors')
    assert trained['logit_scale'].item() == 3.0 and len(trained) == len(expected)
    assert all(torch.equal(value, expected[f'model.{name}']) for name, value in trained.items())
    assert not [w for w in recwarn if 'another teacher' in str(w.message)]


@pytest.mark.parametrize(('change', 'message'), [
    (lambda c: setattr(c.adapter, 'depth', 2), r'model\.adapter\.depth: 2, but 1 there'),
    (lambda c: setattr(c, 'visual_projection', 'affine'), r"model\.visual_projection: 'affine', but 'linear' there"),
    (lambda c: setattr(c, 'logit_bias', -10.0), r'model\.logit_bias: True, but False there'),
    (lambda c: (setattr(c.vision, 'mean', [0.5] * 3), setattr(c.vision, 'std', [0.5] * 3)),
     r'model\.vision\.mean: \[0\.5, .*; model\.vision\.std'),
])
def test_another_model(exported: Path, change: Callable[[ModelConfig], object], message: str) -> None:
    config = copy.deepcopy(CONFIG)
    change(config)
    with pytest.raises(ConfigError, match=f'initial_weights: the model in .* is another one: .*{message}'):
        _load(config, exported)


def test_a_transformers_tower_and_what_its_shapes_do_not_tell(exported_clip: Path) -> None:
    expected = LLM2CLIPModel.from_pretrained(exported_clip).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in _load(CLIP, exported_clip).state_dict().items())
    renamed = copy.deepcopy(CLIP)
    renamed.vision.name = 'another folder of the same architecture'
    _load(renamed, exported_clip)
    for name, value in (('num_attention_heads', 4), ('hidden_act', 'gelu')):
        config = copy.deepcopy(CLIP)
        config.vision.architecture[name] = value
        with pytest.raises(ConfigError, match=rf'model\.vision\.architecture\.{name}: {value!r}, but'):
            _load(config, exported_clip)


def test_weights_that_do_not_fit(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'adapter\.blocks\.0\.norm\.weight has the shape \(32,\), expected \(48,\)'):
        _load(CONFIG, exported, llm_embed_dim=48)
    folder = shutil.copytree(exported, tmp_path / 'x')
    edited(weight_files={})(folder / 'config.json')  # the checksum would find it first
    weights = load_file(folder / 'model.safetensors')
    bias = weights.pop('model.adapter.norm.bias')
    save_file(weights, folder / 'model.safetensors')
    with pytest.raises(ValueError, match=r'the weights lack model\.adapter\.norm\.bias and have nothing besides'):
        _load(CONFIG, folder)
    save_file({**weights, 'model.adapter.norm.bias': bias, 'model.x': bias.clone()}, folder / 'model.safetensors')
    with pytest.raises(ValueError, match=r'the weights lack nothing and have model\.x besides'):
        _load(CONFIG, folder)
    (folder / 'config.json').write_text(json.dumps({'model_type': 'clip'}))
    for bad in (folder, tmp_path):
        with pytest.raises(ConfigError, match='is no exported folder'):
            _load(CONFIG, bad)


def test_another_teacher_is_a_warning(exported: Path, teacher_folder: Path) -> None:
    model = LLM2CLIP(CONFIG, 32, load_weights=False)
    other = Fingerprint(({**teacher_fingerprint(teacher_folder).to_json(), 'pooling': 'last'},))
    with pytest.warns(UserWarning, match="another teacher than the model in .*: pooling is 'last', expected 'mean'"):
        load_initial_weights(model, CONFIG, other, exported)


@pytest.mark.filterwarnings('error')
def test_a_frozen_llm_is_the_same_teacher_before_and_after_its_export(llm_folder: Path, tmp_path: Path) -> None:
    source = FrozenLLM(LLMTeacherConfig(pretrained=str(llm_folder), dtype='float32'))
    record = TeacherRecord(source.fingerprint(), {'llm_embed_dim': 32})
    model = LLM2CLIP(CONFIG, 32, load_weights=False).eval()
    export_folder(model, CONFIG, record, source, tmp_path / 'llm2clip')
    saved = teacher_fingerprint(tmp_path / 'llm2clip/teacher')
    assert saved != record.teacher
    assert load_initial_weights(model, CONFIG, record.teacher, tmp_path / 'llm2clip')
    assert load_initial_weights(model, CONFIG, saved, tmp_path / 'llm2clip')
    edited(learned_from={'concatenated': 7})(tmp_path / 'llm2clip/config.json')
    with pytest.raises(FileError, match=r'llm2clip/config\.json.*learned_from'):
        load_initial_weights(model, CONFIG, saved, tmp_path / 'llm2clip')
