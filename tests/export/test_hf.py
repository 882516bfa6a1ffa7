# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The exported folder: the same numbers, loaded by transformers, as the README says, and its model card."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
import yaml
from accelerate import infer_auto_device_map
from huggingface_hub import ModelCard
from parts import make_samples
from recipes_in_process import REQUIRED
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, register_model
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from trained import trained
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    LlamaConfig,
    PreTrainedModel,
)

from llm2clip.config import ImageDataConfig, ImageStreamConfig, ModelConfig, Stage1Config, Stage2Config, VisionConfig
from llm2clip.config.loading import load_config, save_config
from llm2clip.export import hf
from llm2clip.export.check import pictures, training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.export.model_card import language_model, model_card
from llm2clip.io.files import read_json, write_json
from llm2clip.modeling import loaders, modeling_llm2clip
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.llm import load_teacher

ROOT = Path(__file__).parents[2]


def test_loaded_model_gives_the_same_features(exported: tuple[LLM2CLIP, Path], teacher_folder: Path) -> None:
    model, out = exported
    loaded = AutoModel.from_pretrained(out)
    of_pipelines = AutoModelForZeroShotImageClassification.from_pretrained(out)
    assert type(loaded) is type(of_pipelines) is hf.LLM2CLIPModel and not loaded.training
    pixels, texts = torch.randn(3, 3, 32, 32), [s.captions['long'] for s in make_samples(5)]
    embedding = encode_texts(*load_teacher(teacher_folder), texts)
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_image_features(pixels), model.get_image_features(pixels))
        expected = model.get_text_features(embedding)
        torch.testing.assert_close(loaded.get_text_features(text_embedding=embedding), expected)
        torch.testing.assert_close(loaded.get_text_features(texts), expected)
        torch.testing.assert_close(loaded.get_text_features(texts[0]), expected[:1])
        assert loaded.get_text_features([]).shape == loaded.get_image_features(pixels[:0]).shape == (0, 16)
        logits = loaded(pixels, embedding)['logits_per_image']
    torch.testing.assert_close(logits, model.logit_scale.exp() * model.get_image_features(pixels) @ expected.T)
    with pytest.raises(ValueError, match='either texts or text_embedding'):
        loaded.get_text_features()


def test_the_processor_loads_without_a_warning(
    exported: tuple[LLM2CLIP, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger('transformers'), 'propagate', True)
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level('WARNING', logger='transformers.models.auto.image_processing_auto'):
        AutoImageProcessor.from_pretrained(exported[1])
    assert 'torchvision backend' not in caplog.text


@register_model
def swin_of_tests(pretrained: bool = False, **kwargs: Any) -> Any:
    """Its tables of positions are computed when it is built, here for another resolution, and not saved."""
    model = build_model_with_cfg(SwinTransformer, 'swin_of_tests', pretrained, img_size=16, window_size=4, embed_dim=16,
                                 depths=(1, 1), num_heads=(1, 2), **kwargs)
    model.set_input_size(img_size=32, window_size=8)
    return model


@register_model
def eva_of_tests(pretrained: bool = False, **kwargs: Any) -> Any:
    """Its rotary embeddings are computed when it is built, and not saved."""
    return build_model_with_cfg(Eva, 'eva_of_tests', pretrained, img_size=32, patch_size=8, embed_dim=32, depth=2,
                                num_heads=2, use_rot_pos_emb=True, **kwargs)


@pytest.mark.parametrize('vision', ['clip_vision_model', 'siglip_vision_model', 'timm:eva_of_tests',
                                    'timm:swin_of_tests'])
def test_other_towers_and_several_teachers(
    vision: str, teacher_folder: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    of_run = trained(vision, [teacher_folder, causal_teacher], image_size=32)
    model = of_run.model
    export_folder(*of_run, tmp_path / 'model')
    loaded, texts = AutoModel.from_pretrained(tmp_path / 'model'), ['a red square', 'two']
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_image_features(of_run.pixels()),
                                   model.get_image_features(of_run.pixels()), rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.embed_texts(texts), of_run.vectors(texts), rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.get_text_features(texts), model.get_text_features(of_run.vectors(texts)),
                                   rtol=0, atol=1e-5)
        tokens = AutoProcessor.from_pretrained(tmp_path / 'model')(text=texts, padding=True, return_tensors='pt')
        torch.testing.assert_close(loaded.get_text_features(**tokens), loaded.get_text_features(texts))
    # The names of transformers 4, whichever version this is.
    names = load_file(tmp_path / 'model/model.safetensors')
    assert any('.trunk.vision_model.' in name for name in names) == (not vision.startswith('timm'))


def test_a_model_is_not_published_without_its_teacher(
    exported: tuple[LLM2CLIP, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fail on a folder in the teacher after creating the repository."""
    upload = Mock(return_value='done')
    monkeypatch.setattr(PreTrainedModel, 'push_to_hub', upload)
    folder = shutil.copytree(exported[1], tmp_path / 'model')
    for kind in (hf.LLM2CLIPModel, modeling_llm2clip.LLM2CLIPModel):
        model = kind.from_pretrained(folder)
        assert model.push_to_hub('user/model', private=True) == 'done'
        (folder / 'teacher/0').mkdir()
        with pytest.raises(ValueError, match='hf upload'):
            model.push_to_hub('user/model')
        (folder / 'teacher/0').rmdir()
    assert upload.call_count == 2
    with pytest.raises(ValueError, match='hf upload'):
        model.save_pretrained(tmp_path / 'again', push_to_hub=True)
    assert not (tmp_path / 'again').exists()


def test_eleven_teachers_keep_their_order(tmp_path: Path) -> None:
    names = [str(i) for i in range(11)]
    for name in names:
        (tmp_path / 'teacher' / name).mkdir(parents=True)
    assert [folder.name for folder in hf.LLM2CLIPModel.teacher_folders(tmp_path)] == names


def test_texts_have_one_precision_with_and_without_package(lora_teacher: Path, tmp_path: Path) -> None:
    export_folder(*trained('timm:test_efficientnet', [lora_teacher], image_size=32), tmp_path / 'model')
    with torch.no_grad():
        found, expected = (kind.from_pretrained(tmp_path / 'model').get_text_features(['a red square', 'two'])
                           for kind in (hf.LLM2CLIPModel, modeling_llm2clip.LLM2CLIPModel))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_llm_of_transformers_5_is_read_by_4_or_refused(tmp_path: Path) -> None:
    rope = {'rope_type': 'linear', 'factor': 8.0}
    write_json(tmp_path / 'config.json', {'model_type': 'llama', 'rope_parameters': {**rope, 'rope_theta': 3e4}})
    write_json(tmp_path / 'tokenizer_config.json', {
        'tokenizer_class': 'TokenizersBackend', 'extra_special_tokens': ['<x>']})
    if hasattr(LlamaConfig(), 'rope_theta'):  # transformers 4
        with pytest.raises(loaders.LoadError, match='rope_parameters this version does not read'):
            loaders.load_config(tmp_path)
    loaders.keep_readable(tmp_path)
    loaders.load_config(tmp_path)
    longrope = {'short_factor': [1.0], 'long_factor': [2.0]}
    for written, expected in (
            ({**rope, 'rope_theta': 3e4}, {'rope_theta': 3e4, 'rope_scaling': rope}),
            ({'full_attention': {**rope, 'rope_theta': 3e4}, 'sliding_attention': {'rope_theta': 2e4}},
             {'rope_theta': 3e4, 'rope_scaling': rope, 'rope_local_base_freq': 2e4}),
            ({**longrope, 'rope_type': 'longrope', 'rope_theta': 1e4, 'partial_rotary_factor': 0.75},
             {'rope_theta': 1e4, 'partial_rotary_factor': 0.75, 'rope_scaling': {'type': 'longrope', **longrope}})):
        write_json(tmp_path / 'config.json', {'rope_parameters': written})
        loaders.keep_readable(tmp_path)
        assert read_json(tmp_path / 'config.json', dict) == expected
    assert read_json(tmp_path / 'tokenizer_config.json', dict) == {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'additional_special_tokens': ['<x>']}


BOTH_KINDS = pytest.mark.parametrize('kind', [hf.LLM2CLIPModel, modeling_llm2clip.LLM2CLIPModel])


@BOTH_KINDS
@pytest.mark.parametrize('vision, levels', [('clip_vision_model', 0), ('timm:test_efficientnet', 1)])
def test_a_model_loads_in_bfloat16(
    vision: str, levels: int, kind: type[hf.LLM2CLIPModel], causal_teacher: Path, tmp_path: Path
) -> None:
    of_run = trained(vision, [causal_teacher], feature_levels=levels)
    export_folder(*of_run, tmp_path / 'model')
    texts = ['a red square', 'two']
    for load in (lambda: kind.from_pretrained(tmp_path / 'model', dtype=torch.bfloat16),
                 lambda: kind.from_pretrained(tmp_path / 'model').bfloat16()):
        loaded = load()
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            images, captions = loaded.get_image_features(of_run.pixels()), loaded.get_text_features(texts)
            expected = of_run.model.get_image_features(of_run.pixels())
            expected_captions = of_run.model.get_text_features(of_run.vectors(texts))
        torch.testing.assert_close(images, expected, rtol=0, atol=0.03)
        torch.testing.assert_close(captions, expected_captions, rtol=0, atol=0.03)


@BOTH_KINDS
def test_the_towers_are_on_one_device(kind: type[hf.LLM2CLIPModel], exported: tuple[LLM2CLIP, Path]) -> None:
    loaded: Any = kind.from_pretrained(exported[1])
    size = loaded.get_memory_footprint()
    devices = infer_auto_device_map(loaded, {0: int(0.8 * size), 1: 2 * size}, loaded._no_split_modules)
    assert set(devices.values()) == {1}


@BOTH_KINDS
def test_the_teacher_comes_from_the_hub_when_it_is_asked_for(
    kind: type[hf.LLM2CLIPModel], exported: tuple[LLM2CLIP, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = kind.from_pretrained(exported[1])
    expected = loaded.embed_texts(['a red square'])
    options: Any = {'revision': 'abc', 'token': 'hf_x', 'cache_dir': 'scratch'}
    from_hub, download = kind.from_pretrained(exported[1], **options), Mock(return_value=str(exported[1]))
    from_hub.name_or_path = 'user/model'
    monkeypatch.setattr(modeling_llm2clip, 'snapshot_download', download)
    torch.testing.assert_close(from_hub.embed_texts(['a red square']), expected)
    download.assert_called_once_with('user/model', allow_patterns='teacher/*', **options)


def test_readme_snippet_runs(
    exported: tuple[LLM2CLIP, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r'runs this block -->\n```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported[1], 'runs/quickstart/export/llm2clip')
    for kind, data in pictures(32).items():
        Path('picture.png').write_bytes(data)
        names: dict[str, Any] = {}
        exec(code[1], names)
        assert 'red heart' in capsys.readouterr().out
        with torch.no_grad():
            expected = exported[0].get_image_features(
                training_pixels(data, preprocessing=exported[0].vision_encoder.preprocessing)[None])
        torch.testing.assert_close(names['image'].detach(), expected, msg=kind)


TEACHER = Fingerprint.of('a1b2', {'pooling': 'mean', 'instruction': 'a | b'})


def _stage2(tmp_path: Path) -> Stage2Config:
    streams = {'cc3m': ImageStreamConfig(local=str(tmp_path), remote='s3://secret-bucket/cc3m', proportion=0.25),
               'cc12m': ImageStreamConfig(local='/secret/cc12m', proportion=0.75, caption_weights={'raw': 1.0})}
    return Stage2Config(
        save_folder='/secret/run', run_name='r', max_duration='4ep', global_train_batch_size=4096,
        optimizer={'name': 'adamw', 'lr': 1e-5},
        model=ModelConfig(VisionConfig(str(tmp_path), checkpoint='/secret/tower.safetensors')),
        train_data=ImageDataConfig(streams=streams, caption_weights={'raw': 1.0, 'long': 3.0, 'never': 0.0}))


def test_a_card_has_the_settings_of_the_run_without_paths(tmp_path: Path) -> None:
    run = _stage2(tmp_path)
    model_card(run.model, TEACHER, run, teachers=['me/llm']).save(tmp_path / 'README.md')
    card = ModelCard.load(tmp_path / 'README.md')
    assert card.data.library_name == 'transformers' and card.data.pipeline_tag is None
    for row in ('| language model | me/llm |', '| cc3m | 0.25 of the epoch | raw 25 %, long 75 % |',
                '| cc12m | 0.75 of the epoch | raw 100 % |', '| weights | a1b2 |'):
        assert row in card.text
    training = yaml.safe_load(card.text.split('```yaml')[1].split('```')[0])
    assert training['optimizer']['lr'] == 1e-5 and training['global_train_batch_size'] == 4096
    assert training['model']['vision']['checkpoint'] == 'tower.safetensors'
    # What is published says nothing of where things lie.
    assert 'secret' not in card.content and str(tmp_path) not in card.content
    of_two = model_card(run.model, Fingerprint((*TEACHER.teachers, {'weights': 'c3'}))).text
    assert '| a1b2 |' in of_two and '| c3 |' in of_two


def test_the_language_model_is_the_one_that_stage_1_began_with(teacher_folder: Path, tmp_path: Path) -> None:
    assert language_model(teacher_folder) == f'{teacher_folder.name} (llama)' and language_model('me/llm') == 'me/llm'
    save_config(load_config(Stage1Config, [*REQUIRED['train_stage1'], 'text_encoder.pretrained=me/llm']), tmp_path)
    assert language_model(tmp_path / 'teacher') == 'me/llm'


def test_names_are_shown_and_not_rendered(tmp_path: Path) -> None:
    evil = 'x](http://e) <img src=e onerror=a> | `b`\n---\n# y: {{ 1 }} \x1b[31m\n```\n'
    run = _stage2(tmp_path)
    run.train_data.streams = {evil: ImageStreamConfig(local='a', caption_weights={evil: 1.0})}
    run.optimizer['name'] = evil
    model_card(ModelConfig(VisionConfig(evil)), Fingerprint.of('a', {evil: evil}), run,
               teachers=[evil]).save(tmp_path / 'README.md')
    card = ModelCard.load(tmp_path / 'README.md')
    before, code, after = re.split('````(?:yaml)?\n', card.text.split('## Licence')[1])
    assert yaml.safe_load(code)['optimizer']['name'] == evil
    assert '{{ 1 }}' in before and '\n---\n' not in before + after and '\n# y' not in before + after
    assert not re.search(r'[<>\]\x1b]|`b', re.sub(r'\\.', '', before + after))
