# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Official checkpoints against transformers, timm and the adaptor's formula; nothing of them is passed over."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from official_parts import HALF, HF_CONFIG, adaptor_features, eva_state, hf_state, save_eva, timm_state
from recipes_in_process import run_recipe
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn
from torch.nn import functional as F
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection

import llm2clip.export.hf  # noqa: F401 - registers the exported model
from llm2clip.config import AdapterConfig, VisionConfig
from llm2clip.conversion.official_weights import import_checkpoint
from llm2clip.errors import ConfigError
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.llm import load_teacher

State = dict[str, torch.Tensor]
EVA = VisionConfig('tiny_eva_clip', False, image_size=56, **HALF)
CLIP = VisionConfig('openai/clip-vit', image_size=32, **HALF)


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
def test_hf_gives_the_features_of_transformers_and_of_the_formula(tmp_path: Path) -> None:
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
def test_timm_towers_have_no_projection_and_vectors_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
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
    (_without('visual.blocks.1.attn.v_proj.bias'), r'lacks visual\.blocks\.1\.attn\.v_proj\.bias and has nothing'),
    (_without('text.text_adaptor.3.weight'), r'lacks text\.text_adaptor\.3\.weight, the projection'),
    (_without('visual.cls_token'), r"no official layout: .*the first are \['logit_scale', 'text"),
    (_with('text.transformer.embeddings', 4, 4), r'has text\.transformer\.embeddings besides'),
    (_with('visual.pos_embed', 1, 26, 32), r'visual\.pos_embed has the shape \(1, 26, 32\), expected \(1, 17, 32\)'),
    (_with('logit_scale', 2), r'logit_scale has the shape \(2,\), expected \(1,\)'),
])
def test_every_name_and_shape_is_checked(change: Callable[[State], State], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f'^checkpoint: .*{message}'):
        import_checkpoint(save_eva(tmp_path / 'x.pt', change(eva_state())), EVA)


@pytest.mark.parametrize('wrapper', ['', 'state_dict', 'module', 'model'])
def test_wrapped_weights_in_any_precision(wrapper: str, tmp_path: Path) -> None:
    state = {name: value.half() for name, value in eva_state().items()}
    path = save_eva(tmp_path / 'x.pt', state, wrapper, 'module.' if wrapper else '')
    found = import_checkpoint(path, EVA).model.state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert torch.equal(found['visual_projection.bias'], state['visual.head.bias'].float())


def test_shards_of_a_folder_and_torch_files(tmp_path: Path) -> None:
    state = hf_state()
    whole = _hf_folder(tmp_path / 'whole', state)
    shards = _hf_folder(tmp_path / 'shards', state)
    (shards / 'model.safetensors').unlink()
    names = list(state)
    parts = {'model-1.safetensors': names[:20], 'model-2.safetensors': names[20:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, shards / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (shards / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    torch_file = _hf_folder(tmp_path / 'torch', state)
    (torch_file / 'model.safetensors').unlink()
    torch.save(state, torch_file / 'pytorch_model.bin')
    expected = import_checkpoint(whole, CLIP).model.state_dict()
    for folder in (shards, torch_file):
        found = import_checkpoint(folder, CLIP).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_files_that_would_run_code_or_hold_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**eva_state(), 'x': os.mkdir}, 'code.pt')
    Path('plain.pt').write_bytes(pickle.dumps(os.mkdir, protocol=2))
    whole = io.BytesIO()
    torch.save(eva_state(), whole)
    Path('cut.pt').write_bytes(whole.getvalue()[:5000])
    Path('cut.safetensors').write_bytes(b'abc')
    torch.save([1, 2], 'list.pt')
    Path('empty').mkdir()
    code = 'holds more than weights, which could run code: .*mkdir'
    messages = {'code.pt': code, 'plain.pt': code, 'cut.pt': 'cannot be read', 'cut.safetensors': 'cannot be read',
                'gone.pt': 'cannot be read', 'list.pt': 'list.pt: is no mapping of parameter names',
                'empty': 'has no weights; expected one of'}
    for file, message in messages.items():
        with pytest.raises(ValueError, match=message):
            import_checkpoint(file, EVA)


def test_what_shapes_do_not_tell_is_read_from_the_folder(tmp_path: Path) -> None:
    folder = _hf_folder(tmp_path / 'hf', hf_state(), hidden_act='gelu', num_attention_heads=2)
    imported = import_checkpoint(folder, CLIP)
    trunk = imported.model.vision_encoder.trunk.config
    assert (trunk.hidden_act, trunk.num_attention_heads) == ('gelu', 2)
    plain = import_checkpoint(_hf_folder(tmp_path / 'plain', hf_state()), CLIP)
    assert plain.model.vision_encoder.trunk.config.hidden_act == 'quick_gelu'
    given = VisionConfig('x', architecture={'model_type': 'clip_vision_model', 'num_attention_heads': 4}, image_size=32,
                         **HALF)
    with pytest.raises(ConfigError, match=r'vision\.architecture\.num_attention_heads: 4, but .*config\.json says 2'):
        import_checkpoint(folder, given)
    towers_only = {k: v for k, v in hf_state().items() if not k.startswith('text_adapter')}
    with pytest.raises(ConfigError, match=r'lacks text_adapter\.adaptor\.1\.weight, .*hold the vision tower alone'):
        import_checkpoint(_hf_folder(tmp_path / 'old', towers_only), CLIP)


def test_the_recipe_writes_a_folder_that_transformers_loads(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_eva(tmp_path / 'x.pt', eva_state())
    args = [f'checkpoint={path}', 'vision.name=tiny_eva_clip', 'vision.image_size=56', f'out={tmp_path}/out']
    run_recipe(monkeypatch, 'import_official', *args, f'teacher={teacher_folder}')
    loaded = AutoModel.from_pretrained(tmp_path / 'out/llm2clip')
    expected = import_checkpoint(path, EVA).model
    images, vectors = torch.randn(2, 3, 56, 56), torch.randn(3, 32)
    texts = ['a red circle', 'a blue square on a wall']
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_image_features(images), expected.get_image_features(images))
        torch.testing.assert_close(loaded.get_text_features(text_embedding=vectors),
                                   expected.get_text_features(vectors))
        torch.testing.assert_close(loaded.get_text_features(texts), expected.get_text_features(
            encode_texts(*load_teacher(teacher_folder), texts)))
