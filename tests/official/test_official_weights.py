# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Official checkpoints against transformers, timm and the adaptor's formula; exported weights to begin with."""

import copy
import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from damage import edited
from launched import stage2_arguments
from official_parts import HALF, HF_CONFIG, adaptor_features, eva_state, hf_state, save_eva, timm_state
from recipes_in_process import run_recipe
from refusals import refused_at
from safetensors.torch import load_file, save_file
from timm.models.eva import checkpoint_filter_fn
from torch.nn import functional as F
from towers import hf_tower
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from llm2clip.config import AdapterConfig, LLMTeacherConfig, ModelConfig, TowerConfig, VisionConfig
from llm2clip.errors import ConfigError, FileError
from llm2clip.export.hf import LLM2CLIPModel, export_folder
from llm2clip.modeling.loaders import LoadError
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.official.official_weights import import_checkpoint
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import load_teacher, teacher_fingerprint
from llm2clip.teacher.sources import FrozenLLM
from llm2clip.training.runs import Stage2Run, load_initial_weights

State = dict[str, torch.Tensor]
EVA = VisionConfig('tiny_eva_clip', False, image_size=56, **HALF)
CLIP = VisionConfig('openai/clip-vit', image_size=32, **HALF)
MODEL = ModelConfig(VisionConfig('test_efficientnet.r160_in1k', False, image_size=32), AdapterConfig(depth=1),
                    embed_dim=16)
CLIP_MODEL = dataclasses.replace(MODEL, vision=hf_tower('clip_vision_model'))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _hf_folder(folder: Path, state: State, **vision: object) -> Path:
    folder.mkdir()
    config = {**HF_CONFIG, 'vision_config': {**HF_CONFIG['vision_config'], **vision}}
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(state, folder / 'model.safetensors')
    return folder


@torch.no_grad()
def _image_features(model: LLM2CLIP, images: torch.Tensor) -> torch.Tensor:
    return model.visual_projection(model.vision_encoder(images))


@torch.no_grad()
def test_eva_gives_the_features_of_timm_and_of_the_formula(tmp_path: Path) -> None:
    state = eva_state()
    model, config, width = import_checkpoint(save_eva(tmp_path / 'x.pt', state), EVA)
    assert config.adapter == AdapterConfig(depth=2, expansion=2) and (config.embed_dim, width) == (16, 32)
    assert config.visual_projection == 'affine' and not model.training
    reference = timm.create_model('tiny_eva_clip').eval()
    reference.load_state_dict(checkpoint_filter_fn(state, reference))
    images, vectors = torch.randn(3, 3, 56, 56), torch.randn(4, 32)
    torch.testing.assert_close(_image_features(model, images), reference(images))
    expected = adaptor_features(state, 'text.text_adaptor', vectors, normalize=True)
    torch.testing.assert_close(model.get_text_features(vectors), F.normalize(expected, dim=-1))
    torch.testing.assert_close(model.logit_scale, state['logit_scale'].reshape(1))


@torch.no_grad()
def test_hf_gives_features_of_transformers_and_of_the_formula(tmp_path: Path) -> None:
    state = hf_state()
    folder = _hf_folder(tmp_path / 'hf', {**state, 'vision_model.embeddings.position_ids': torch.arange(17)[None]})
    model, config, width = import_checkpoint(folder, CLIP)
    assert (config.visual_projection, config.embed_dim, width) == ('linear', 16, 32)
    reference = CLIPVisionModelWithProjection(CLIPVisionConfig(**HF_CONFIG['vision_config'])).eval()
    reference.load_state_dict({k: v for k, v in state.items() if k.startswith('vis')})
    images, vectors = torch.randn(3, 3, 32, 32), torch.randn(4, 32)
    torch.testing.assert_close(_image_features(model, images), reference(images).image_embeds)
    expected = adaptor_features(state, 'text_adapter.adaptor', vectors, normalize=True)
    torch.testing.assert_close(model.get_text_features(vectors), F.normalize(expected, dim=-1))


@torch.no_grad()
def test_timm_towers_have_no_projection_and_keep_vector_lengths(tmp_path: Path) -> None:
    reference = timm.create_model('test_vit', num_classes=0, img_size=64).eval()
    state = timm_state(reference.state_dict(), reference.num_features)
    vision = VisionConfig('test_vit', False, image_size=64)
    model, config, _ = import_checkpoint(save_eva(tmp_path / 'x.pt', state), vision)
    assert config.visual_projection == 'identity' and not config.adapter.normalize and config.logit_bias is None
    images, vectors = torch.randn(2, 3, 64, 64), 5 * torch.randn(4, 32)
    torch.testing.assert_close(model.get_image_features(images), F.normalize(reference(images), dim=-1))
    expected = adaptor_features(state, 'text.text_proj.text_adaptor', vectors, normalize=False)
    torch.testing.assert_close(model.get_text_features(vectors), F.normalize(expected, dim=-1))
    state['logit_bias'] = torch.tensor(-9.5)
    model, config, _ = import_checkpoint(save_eva(tmp_path / 'x.pt', state), vision)
    assert config.logit_bias is not None and model.logit_bias is not None and model.logit_bias.item() == -9.5


def _without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def _with(key: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, key: torch.zeros(shape)}


@pytest.mark.parametrize(('change', 'message'), [
    (_without('visual.blocks.1.attn.v_proj.bias'), r"lack \['visual\.blocks\.1\.attn\.v_proj\.bias'\] and have \[\]"),
    (_without('text.text_adaptor.3.weight'), r'checkpoint: it lacks text\.text_adaptor\.3\.weight, the projection'),
    (_without('visual.cls_token'), r"no official layout: .*the first are \['logit_scale', 'text"),
    (_with('text.transformer.embeddings', 4, 4), r"have \['text\.transformer\.embeddings'\] besides"),
    (_with('logit_scale', 2), r'logit_scale has the shape \(2,\), expected \(1,\)'),
])
def test_every_name_and_shape_is_checked(change: Callable[[State], State], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, LoadError), match=message):
        import_checkpoint(save_eva(tmp_path / 'x.pt', change(eva_state())), EVA)


@pytest.mark.parametrize('wrapper', ['', 'state_dict', 'module', 'model'])
def test_wrapped_weights_of_any_precision_are_read(wrapper: str, tmp_path: Path) -> None:
    state = {name: value.half() for name, value in eva_state().items()}
    path = save_eva(tmp_path / 'x.pt', state, wrapper, 'module.' if wrapper else '')
    found = import_checkpoint(path, EVA).model.state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert torch.equal(found['visual_projection.bias'], state['visual.head.bias'].float())


def test_a_folder_may_have_a_file_of_torch(tmp_path: Path) -> None:
    folder = _hf_folder(tmp_path / 'folder', hf_state())
    expected = import_checkpoint(folder, CLIP).model.state_dict()
    (folder / 'model.safetensors').unlink()
    torch.save(hf_state(), folder / 'pytorch_model.bin')
    found = import_checkpoint(folder, CLIP).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_files_with_code_or_without_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**eva_state(), 'x': os.mkdir}, 'code.pt')
    Path('plain.pt').write_bytes(pickle.dumps(os.mkdir, protocol=2))
    torch.save([1, 2], 'list.pt')
    Path('empty').mkdir()
    code = 'holds more than weights, which could run code: .*mkdir'
    for file, message in (('code.pt', code), ('plain.pt', code), ('list.pt', 'list.pt: .*expected a mapping of'),
                          ('empty', r'model\.safetensors: cannot be read')):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(file, EVA)


def test_the_folder_tells_what_shapes_do_not(tmp_path: Path) -> None:
    folder = _hf_folder(tmp_path / 'hf', hf_state(), hidden_act='gelu', num_attention_heads=2)
    imported = import_checkpoint(folder, CLIP)
    trunk = imported.model.vision_encoder.trunk.config
    assert (trunk.hidden_act, trunk.num_attention_heads) == ('gelu', 2)
    plain = import_checkpoint(_hf_folder(tmp_path / 'plain', hf_state()), CLIP)
    assert plain.model.vision_encoder.trunk.config.hidden_act == 'quick_gelu'
    given = VisionConfig('x', architecture={'model_type': 'clip_vision_model', 'num_attention_heads': 4}, image_size=32,
                         **HALF)
    with refused_at('vision.architecture.num_attention_heads'):
        import_checkpoint(folder, given)


def test_the_recipe_writes_a_folder_that_transformers_loads(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_eva(tmp_path / 'x.pt', eva_state())
    args = [f'checkpoint={path}', 'vision.name=tiny_eva_clip', 'vision.image_size=56', f'out={tmp_path}/out']
    run_recipe(monkeypatch, 'import_official', *args, f'teacher={teacher_folder}')
    loaded = AutoModel.from_pretrained(tmp_path / 'out/llm2clip')
    expected = import_checkpoint(path, EVA).model
    images, texts = torch.randn(2, 3, 56, 56), ['a red circle', 'a blue square on a wall']
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_image_features(images), expected.get_image_features(images))
        torch.testing.assert_close(loaded.get_text_features(texts), expected.get_text_features(
            encode_texts(*load_teacher(teacher_folder), texts)))


def _export(config: ModelConfig, teacher: Path, out: Path) -> Path:
    torch.manual_seed(5)
    model = LLM2CLIP(config, 32, load_weights=False).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    record = TeacherRecord(teacher_fingerprint(teacher), {'llm_embed_dim': 32})
    export_folder(model, config, record, [teacher], out)
    return out


@pytest.fixture(scope='module')
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(MODEL, teacher_folder, tmp_path_factory.mktemp('exported') / 'llm2clip')


@pytest.fixture(scope='module')
def exported_clip(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(CLIP_MODEL, teacher_folder, tmp_path_factory.mktemp('exported') / 'llm2clip')


def _load(config: ModelConfig, folder: Path) -> LLM2CLIP:
    torch.manual_seed(6)
    model = LLM2CLIP(config, 32, load_weights=False)
    load_initial_weights(model, config, Fingerprint(({},)), folder)
    return model


def test_training_begins_with_exported_weights(
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


def test_weights_of_another_model_are_refused(exported_clip: Path, tmp_path: Path) -> None:
    config = copy.deepcopy(CLIP_MODEL)
    config.vision.name = 'another folder of the same architecture'
    found, expected = _load(config, exported_clip), LLM2CLIPModel.from_pretrained(exported_clip).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    changes: list[tuple[str, Callable[[ModelConfig], object]]] = [
        ('adapter.depth', lambda c: setattr(c.adapter, 'depth', 2)),
        ('visual_projection', lambda c: setattr(c, 'visual_projection', 'affine')),
        ('logit_bias', lambda c: setattr(c, 'logit_bias', -10.0)),
        ('vision.mean', lambda c: vars(c.vision).update(mean=[0.1] * 3, std=[0.2] * 3)),
        (r'vision.beside.\[0\]', lambda c: c.vision.beside.append(TowerConfig('test_efficientnet', False))),
        # Shapes do not tell these two.
        ('vision.architecture.num_attention_heads', lambda c: c.vision.architecture.update(num_attention_heads=4)),
        ('vision.architecture.hidden_act', lambda c: c.vision.architecture.update(hidden_act='gelu'))]
    for key, change in changes:
        config = copy.deepcopy(CLIP_MODEL)
        change(config)
        with pytest.raises(ConfigError, match=f'initial_weights: the model in .* is another one: model.{key} is '):
            _load(config, exported_clip)
    (tmp_path / 'config.json').write_text('{"model_type": "clip"}')
    with pytest.raises(ConfigError, match='is neither an exported folder nor that of a stage-2 run'):
        _load(CLIP_MODEL, tmp_path)


def test_another_teacher_of_exported_weights_is_a_warning(exported: Path, teacher_folder: Path) -> None:
    model = LLM2CLIP(MODEL, 32, load_weights=False)
    other = Fingerprint(({**teacher_fingerprint(teacher_folder).to_json(), 'pooling': 'last'},))
    with pytest.warns(UserWarning, match="another teacher than the model in .*: pooling is 'last', expected 'mean'"):
        load_initial_weights(model, MODEL, other, exported)


@pytest.mark.filterwarnings('error')
def test_a_frozen_llm_is_the_same_teacher_after_its_export(llm_folder: Path, tmp_path: Path) -> None:
    source = FrozenLLM(LLMTeacherConfig(pretrained=str(llm_folder), dtype='float32'))
    record = TeacherRecord(source.fingerprint(), {'llm_embed_dim': 32})
    model = LLM2CLIP(MODEL, 32, load_weights=False).eval()
    export_folder(model, MODEL, record, [source], tmp_path / 'llm2clip')
    saved = teacher_fingerprint(tmp_path / 'llm2clip/teacher')
    assert saved != record.teacher
    assert load_initial_weights(model, MODEL, record.teacher, tmp_path / 'llm2clip')
    assert load_initial_weights(model, MODEL, saved, tmp_path / 'llm2clip')
    edited(learned_from={'concatenated': 7})(tmp_path / 'llm2clip/config.json')
    with pytest.raises(FileError, match=r'llm2clip/config\.json.*learned_from'):
        load_initial_weights(model, MODEL, saved, tmp_path / 'llm2clip')
