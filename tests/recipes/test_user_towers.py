# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The vision tower of the page: trained, evaluated, embedded with, exported, and loaded without this package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from parts import picture
from recipes_in_process import example_of_the_page, run_recipe
from refusals import refused_at
from safetensors.torch import load_file, save_file

from llm2clip.config import VisionConfig
from llm2clip.data.schema import EMBEDDING, read_samples
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import Stage2Run

MODULES, TOWER = 'modules=[my_towers]', 'vision={name: conv_tower, pretrained: false, image_size: 32%s}'
# In a Python without this package, and without the module of the user.
LOAD = """
import sys
sys.modules['llm2clip'] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
pixels = load_file('pixels.safetensors')['pixels']
model = AutoModel.from_pretrained('export/llm2clip', trust_remote_code=True)
with torch.no_grad():
    found = {'images': model.get_image_features(pixels)}
sys.path.append('vision')
import timm
import vision_tower
with torch.no_grad():
    found['tower'] = timm.create_model('local-dir:vision', pretrained=True).eval()(pixels)
save_file(found, 'found.safetensors')
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which has the module of the user."""
    (tmp_path / 'my_towers.py').write_text(example_of_the_page('@register_model'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    yield tmp_path
    sys.modules.pop('my_towers', None)
    timm.models._registry._model_entrypoints.pop('conv_tower', None)


@pytest.mark.long
def test_the_tower_of_the_page_is_trained_evaluated_and_exported(
    folder: Path, stage2_args: list[str], image_dataset: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*stage2_args, MODULES, 'model.' + TOWER % ', freeze_blocks: 1', f'teacher={teacher_folder}',
            'layer_decay=0.9', 'save_folder=run']
    with refused_at('model.vision.name'):
        run_recipe(monkeypatch, 'train_stage2', *args, 'modules=[]')
    run_recipe(monkeypatch, 'train_stage2', *args)
    assert len(read_metrics(folder / 'run/metrics.jsonl')['loss/train/total']) == 6
    model = Stage2Run('run').load_model()
    layers = model.vision_encoder.layer_ids
    assert layers['stem.weight'] == 0 and layers['blocks.3.bias'] == 4
    assert [name for name, weight in model.vision_encoder.trunk.named_parameters() if not weight.requires_grad] == [
        'stem.weight', 'stem.bias', 'blocks.0.weight', 'blocks.0.bias']

    common = [MODULES, 'device=cpu']
    run_recipe(monkeypatch, 'evaluate', *common, 'models.m.run=run', 'out=results',
               f'retrieval.r={{local: {image_dataset}, caption_keys: [short]}}')
    assert list(folder.glob('results/*.json'))
    run_recipe(monkeypatch, 'extract_image_embeddings', *common, TOWER % '', 'out=vectors',
               f'datasets.d.local={image_dataset}')
    assert len(read_samples(folder / 'vectors/d')[0][EMBEDDING + 'image']) == 64
    run_recipe(monkeypatch, 'export_hf', MODULES, 'run=run', 'out=export')
    run_recipe(monkeypatch, 'export_vision', MODULES, 'run=run', 'out=vision')
    (folder / 'pictures').mkdir()
    (folder / 'pictures/a.jpg').write_bytes(picture(1))
    run_recipe(monkeypatch, 'search', *common, 'model=export/llm2clip', 'images=pictures', 'query=a square')

    pixels = torch.randn(3, 3, 32, 32)
    save_file({'pixels': pixels}, 'pixels.safetensors')
    environment = {**os.environ, 'HF_HOME': str(folder / 'cache'), 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': ''}
    (folder / 'my_towers.py').unlink()
    subprocess.run([sys.executable, '-c', LOAD], env=environment, check=True)
    found = load_file('found.safetensors')
    with torch.no_grad():
        torch.testing.assert_close(found['images'], model.get_image_features(pixels))
        torch.testing.assert_close(torch.nn.functional.normalize(found['tower'], dim=-1), found['images'])
    assert json.loads((folder / 'vision/config.json').read_text())['architecture'] == 'conv_tower'
    assert 'import vision_tower' in (folder / 'vision/README.md').read_text()


@pytest.mark.parametrize('lacking', ['reset_classifier', 'group_matcher', 'head_hidden_size'])
def test_what_a_tower_lacks_is_named(
    lacking: str, folder: Path, stage2_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (folder / 'my_towers.py').read_text()
    (folder / 'my_towers.py').write_text(text.replace(lacking, 'other'))
    with refused_at('model.vision.name', f'conv_tower lacks {lacking}'):
        run_recipe(monkeypatch, 'train_stage2', *stage2_args, MODULES, 'model.' + TOWER % '', 'save_folder=run')


@pytest.mark.parametrize(('key', 'value'), [
    ('model.vision.gradient_checkpointing', 'true'), ('model.vision.feature_levels', '1'),
    ('algorithms.patch_dropout', '{}')])
def test_a_tower_without_an_option_is_named(
    key: str, value: str, folder: Path, stage2_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused_at(key):
        run_recipe(monkeypatch, 'train_stage2', *stage2_args, MODULES, 'model.' + TOWER % '', f'{key}={value}',
                   'save_folder=run')


def test_weights_come_from_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    import my_towers  # pyright: ignore[reportMissingImports]
    weights = my_towers.ConvTower(0).state_dict()
    save_file(weights, 'weights.safetensors')
    encoder = VisionEncoder(VisionConfig('conv_tower', checkpoint='weights.safetensors', image_size=32))
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5) and len(weights) == 10
    for name, weight in encoder.trunk.named_parameters():
        assert torch.equal(weight, weights[name])


def test_a_module_that_cannot_be_imported_is_named(
    folder: Path, stage2_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / 'broken.py').write_text('x = 1 / 0\n')
    for module, words in (('no_module', 'no_module'), ('broken', r'broken\.py:1: ZeroDivisionError')):
        with refused_at('modules[1]', words):
            run_recipe(monkeypatch, 'train_stage2', *stage2_args, f'modules=[my_towers, {module}]', 'save_folder=run')
    assert not (folder / 'run').exists()
