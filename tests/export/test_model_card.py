# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The model card: what the run says, as metadata of the Hub and in words."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from llm2clip.config import ImageDataConfig, ImageStreamConfig, ModelConfig, Stage1Config, Stage2Config, VisionConfig
from llm2clip.config.loading import load_config, save_config
from llm2clip.export.model_card import language_model, model_card
from llm2clip.teacher.fingerprint import Fingerprint

TEACHER = Fingerprint.of('a1b2', {'pooling': 'mean', 'instruction': 'a | b'})


def _run(tmp_path: Path) -> Stage2Config:
    streams = {'cc3m': ImageStreamConfig(local=str(tmp_path), remote='s3://secret-bucket/cc3m', proportion=0.25),
               'cc12m': ImageStreamConfig(local='/secret/cc12m', proportion=0.75, caption_weights={'raw': 1.0})}
    return Stage2Config(
        save_folder='/secret/run', run_name='r', max_duration='4ep', global_train_batch_size=4096,
        optimizer={'name': 'adamw', 'lr': 1e-5},
        model=ModelConfig(VisionConfig(str(tmp_path), checkpoint='/secret/tower.safetensors')),
        train_data=ImageDataConfig(streams=streams, caption_weights={'raw': 1.0, 'long': 3.0, 'never': 0.0}))


def test_a_card_has_the_settings_of_the_run_without_paths(tmp_path: Path) -> None:
    run = _run(tmp_path)
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


def test_the_language_model_is_the_one_that_stage_1_began_with(teacher_folder: Path, tmp_path: Path) -> None:
    assert language_model(teacher_folder) == f'{teacher_folder.name} (llama)' and language_model('me/llm') == 'me/llm'
    save_config(load_config(Stage1Config, [
        'run_name=r', f'save_folder={tmp_path}', 'max_duration=1ep', 'train_data.streams.s.local=d',
        'global_train_batch_size=8', 'optimizer.lr=1e-3', 'text_encoder.pretrained=me/llm']), tmp_path)
    assert language_model(tmp_path / 'teacher') == 'me/llm'


def test_a_card_without_run_names_all_teachers() -> None:
    card = model_card(ModelConfig(VisionConfig('test_vit', False)), Fingerprint((*TEACHER.teachers, {'weights': 'c3'})))
    assert '| a1b2 |' in card.text and '| c3 |' in card.text


def test_names_are_shown_and_not_rendered(tmp_path: Path) -> None:
    evil = 'x](http://e) <img src=e onerror=a> | `b`\n---\n# y: {{ 1 }} \x1b[31m\n```\n'
    run = _run(tmp_path)
    run.train_data.streams = {evil: ImageStreamConfig(local='a', caption_weights={evil: 1.0})}
    run.optimizer['name'] = evil
    model_card(ModelConfig(VisionConfig(evil)), Fingerprint.of('a', {evil: evil}), run,
               teachers=[evil]).save(tmp_path / 'README.md')
    card = ModelCard.load(tmp_path / 'README.md')
    before, code, after = re.split('````(?:yaml)?\n', card.text.split('## Licence')[1])
    assert yaml.safe_load(code)['optimizer']['name'] == evil
    assert '{{ 1 }}' in before and '\n---\n' not in before + after and '\n# y' not in before + after
    assert not re.search(r'[<>\]\x1b]|`b', re.sub(r'\\.', '', before + after))
