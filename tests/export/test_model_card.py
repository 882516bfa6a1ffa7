# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The model card: what the run says, as metadata of the Hub and in words."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from llm2clip.config import (
    ConfigError,
    EvaluateConfig,
    EvaluatedModelConfig,
    ImageDataConfig,
    ImageStreamConfig,
    ModelConfig,
    Stage1Config,
    Stage2Config,
    VisionConfig,
)
from llm2clip.config.files import load_config, save_config
from llm2clip.export.model_card import language_model, model_card, read_results
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.weights import tensors_hash

NUMBERS = {'flickr': {'n_images': 1000, 'n_texts': 5000, 'image_retrieval_recall@1': 85.123, 'chance@10': 0.1},
           'coco': {'n_images': 5000, 'n_texts': 25000, 'image_retrieval_recall@1': 57.5, 'chance@10': 0.04}}
TEACHER = Fingerprint.of('a1b2', {'pooling': 'mean', 'instruction': 'a | b'})


def _run(tmp_path: Path) -> Stage2Config:
    streams = {'cc3m': ImageStreamConfig(local=str(tmp_path), remote='s3://secret-bucket/cc3m', proportion=0.25),
               'cc12m': ImageStreamConfig(local='/secret/cc12m', proportion=0.75, caption_mix={'raw': 1.0})}
    return Stage2Config(
        save_folder='/secret/run', run_name='r', max_duration='4ep', global_train_batch_size=4096,
        optimizer={'name': 'adamw', 'lr': 1e-5},
        model=ModelConfig(VisionConfig(str(tmp_path), checkpoint='/secret/tower.safetensors')),
        train_data=ImageDataConfig(streams=streams, caption_mix={'raw': 1.0, 'long': 3.0, 'never': 0.0}))


def test_card_of_a_run(tmp_path: Path) -> None:
    run = _run(tmp_path)
    model_card(run.model, TEACHER, run, NUMBERS, language_models=['me/llm']).save(tmp_path / 'README.md')
    card = ModelCard.load(tmp_path / 'README.md')
    assert card.data.library_name == 'transformers' and card.data.pipeline_tag is None
    assert '| language model | me/llm |' in card.text and 'licences of me/llm and ' in card.text
    assert 'llm2clip' in card.data.tags
    results = card.data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ('flickr', 'image_retrieval_recall@1', 85.123), ('coco', 'image_retrieval_recall@1', 57.5)]
    assert '| cc3m | 0.25 of the epoch | raw 25 %, long 75 % |' in card.text
    assert '| cc12m | 0.75 of the epoch | raw 100 % |' in card.text
    assert '| flickr | 1,000 | 5,000 | 85.1 | 0.1 |' in card.text and '| weights | a1b2 |' in card.text
    training = yaml.safe_load(card.text.split('```yaml')[1].split('```')[0])
    assert training['optimizer']['lr'] == 1e-5 and training['global_train_batch_size'] == 4096
    assert training['model']['vision']['checkpoint'] == 'tower.safetensors'
    # What is published says nothing of where things lie.
    assert 'secret' not in card.content and str(tmp_path) not in card.content


def test_the_language_model_is_the_one_that_stage_1_began_with(teacher_folder: Path, tmp_path: Path) -> None:
    assert language_model(teacher_folder) == f'{teacher_folder.name} (llama)' and language_model('me/llm') == 'me/llm'
    save_config(load_config(Stage1Config, [
        'run_name=r', f'save_folder={tmp_path}', 'max_duration=1ep', 'train_data.streams.s.local=d',
        'global_train_batch_size=8', 'optimizer.lr=1e-3', 'text_encoder.pretrained=me/llm']), tmp_path)
    assert language_model(tmp_path / 'teacher') == 'me/llm'


def test_card_without_run_or_results() -> None:
    card = model_card(ModelConfig(VisionConfig('test_vit', False)), Fingerprint((*TEACHER.teachers, {'weights': 'c3'})))
    assert card.data.eval_results is None and 'Results' not in card.text
    assert '| a1b2 |' in card.text and '| c3 |' in card.text and 'Not recorded' in card.text


def test_names_are_shown_and_not_rendered(tmp_path: Path) -> None:
    evil = 'x](http://e) <img src=e onerror=a> | `b`\n---\n# y: {{ 1 }} \x1b[31m\n```\n'
    run = _run(tmp_path)
    run.train_data.streams = {evil: ImageStreamConfig(local='a', caption_mix={evil: 1.0})}
    run.optimizer['name'] = evil
    model_card(ModelConfig(VisionConfig(evil)), Fingerprint.of('a', {evil: evil}), run, {evil: {evil: 1.0}},
               language_models=[evil]).save(tmp_path / 'README.md')
    card = ModelCard.load(tmp_path / 'README.md')
    assert card.data.eval_results[0].dataset_name == evil
    before, code, after = re.split('````(?:yaml)?\n', card.text.split('## Licence')[1])
    assert yaml.safe_load(code)['optimizer']['name'] == evil
    assert '{{ 1 }}' in before and '\n---\n' not in before + after and '\n# y' not in before + after
    assert not re.search(r'[<>\]\x1b]|`b', re.sub(r'\\.', '', before + after))


def test_results_must_be_of_these_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='results: .* has no results.json with its config.yaml'):
        read_results(tmp_path, 'run', 'latest')
    models = {'ours': EvaluatedModelConfig(run='run'), 'theirs': EvaluatedModelConfig(pretrained='clip')}
    save_config(EvaluateConfig(models=models, out=str(tmp_path)), tmp_path)
    retrieval = {name: {'models': {'theirs': {}, 'ours': {**values, 'intervals': {}}}} for name, values in
                 NUMBERS.items()}
    zeroshot = {'imagenet': {'models': {'ours': {'zeroshot_top1': 70.1, 'per_class': {'cat': 1.0}}}}}
    (tmp_path / 'results.json').write_text(
        json.dumps({'retrieval': retrieval, 'zeroshot': zeroshot, 'linear_probe': {}, 'composition': {}}))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match='hash unknown, expected those that are exported, with the hash [0-9a-f]{16}'):
        read_results(tmp_path, 'run', 'latest', model=model)
    results = {'retrieval': retrieval, 'zeroshot': zeroshot, 'linear_probe': {}, 'composition': {},
               'weights': {'ours': tensors_hash(model.state_dict()), 'theirs': 'b'}}
    (tmp_path / 'results.json').write_text(json.dumps(results))
    assert read_results(tmp_path, './run', 'latest', model=model) == {**NUMBERS, 'imagenet': {'zeroshot_top1': 70.1}}
    model.bias.data += 1
    with pytest.raises(ConfigError, match=f"of run with the hash {results['weights']['ours']}, expected"):
        read_results(tmp_path, 'run', 'latest', model=model)
    with pytest.raises(ConfigError, match='is about the latest weights of run, not the best weights of run'):
        read_results(tmp_path, 'run', 'best')
    config = (tmp_path / 'config.yaml').read_text()
    (tmp_path / 'config.yaml').write_text(config.replace('run: run', r'run: "\x24{oc.env:HOME}"'))
    with pytest.raises(ConfigError, match='asks for another value'):
        read_results(tmp_path, 'run', 'latest')
    models['ours'].interpolate, models['ours'].dim = 0.5, 64
    save_config(EvaluateConfig(models=models, out=str(tmp_path)), tmp_path)
    assert list(read_results(tmp_path, 'run', 'latest', 0.5, 64)) == ['flickr', 'coco', 'imagenet']
    with pytest.raises(ConfigError, match='latest weights interpolated to 0.5 in 64 dimensions of run, not .* in 32'):
        read_results(tmp_path, 'run', 'latest', 0.5, 32)
