# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configurations from YAML files and overrides, and errors that name key, file, line and nearest valid name."""

import json
from pathlib import Path

import pytest
from recipes_in_process import REQUIRED as OF_RECIPE
from recipes_in_process import SCHEMAS
from refusals import refused_at

from llm2clip.config import LLMTeacherConfig, SentenceTransformersTeacherConfig, Stage1Config, Stage2Config
from llm2clip.config.loading import check_settings, learned_settings, load_config, read_config, save_config
from llm2clip.errors import ConfigError, FileError

REQUIRED, STAGE1 = OF_RECIPE['train_stage2'], OF_RECIPE['train_stage1']


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _refusal(*args: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        load_config(Stage2Config, args)
    return error.value


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    a = _write(tmp_path / 'a.yaml', 'seed: 1\nmodel: {embed_dim: 8, adapter: {depth: 2}}\n')
    b = _write(tmp_path / 'b.yaml', 'seed: 2\nmodel: {embed_dim: 16}\nloss: {<<: {block_size: 4}}\n')
    config = load_config(Stage2Config, [a, b, *REQUIRED, 'model.adapter.expansion=3'])
    assert (config.seed, config.model.embed_dim, config.model.adapter.depth, config.model.adapter.expansion,
            config.loss.block_size) == (2, 16, 2, 3, 4)
    path = _write(tmp_path / 'c.yaml', "text_encoder: {instruction: 'Find it: '}\n")
    for instruction in ('', "*it's*: "):
        config = load_config(Stage1Config, [path, *STAGE1, f'text_encoder.instruction={instruction}'])
        assert config.text_encoder.instruction == instruction


def test_null_removes_an_entry_of_a_mapping(tmp_path: Path) -> None:
    base = _write(tmp_path / 'a.yaml', 'train_data: {streams: {a: {local: x}, b: {local: y}, c: {local: z}}}\n')
    path = _write(tmp_path / 'b.yaml', 'train_data: {streams: {b: null, other: null}}\n')
    config = load_config(Stage1Config, [base, path, *STAGE1, 'train_data.streams.c=null'])
    assert list(config.train_data.streams) == ['a', 's']
    # The same holds for arguments of parts, for numbers, and for a mapping as a whole.
    config = load_config(Stage2Config, [*REQUIRED, 'algorithms.patch_dropout={}', 'algorithms.clamp_logit_scale=null',
                                        'lr_scale={adapter: 2, logit_scale: 1}', 'lr_scale.adapter=null',
                                        'loggers.wandb.project=p', 'loggers=null', 'train_data.caption_weights=null'])
    assert (config.algorithms, config.lr_scale, config.loggers) == ({'patch_dropout': {}}, {'logit_scale': 1}, {})


def test_a_section_is_for_the_recipe_of_its_name(tmp_path: Path) -> None:
    text = ('width: 7\nteacher: t\ntrain_stage2: {checkpoint_folder: "${teacher}-${width}", model: {embed_dim: 3}}\n'
            'train_inheritance: {teacher: u, checkpoint_folder: "${teacher}"}\nevaluate: {absent: "${x.y}"}\n')
    path = _write(tmp_path / 'a.yaml', text)
    later = _write(tmp_path / 'b.yaml', 'checkpoint_folder: b\n')
    config = load_config(Stage2Config, [path, *REQUIRED])
    assert (config.teacher, config.model.embed_dim, config.checkpoint_folder) == ('t', 3, 't-7')
    assert load_config(Stage2Config, [path, later, *REQUIRED]).checkpoint_folder == 'b'
    inherited = load_config(SCHEMAS['train_inheritance'], [path, *OF_RECIPE['train_inheritance']])
    assert (inherited.teacher, inherited.checkpoint_folder) == ('u', 'u')
    error = _refusal(_write(tmp_path / 'a.yaml', text.replace('model', 'modell')), *REQUIRED)
    assert (error.key, error.place) == ('modell', f'{path}:3')
    assert _refusal(*REQUIRED, 'train_inheritance.seed=3').key == 'train_inheritance'


def test_a_text_encoder_replaces_one_of_another_type(tmp_path: Path) -> None:
    folder = _write(tmp_path / 'a.yaml', 'teacher: runs/stage1/teacher\n')
    model = _write(tmp_path / 'b.yaml', 'teacher: {type: sentence_transformers, name: x, prompt_name: query}\n')
    both = _write(tmp_path / 'c.yaml', 'teacher: [runs/stage1/teacher, {type: llm, pretrained: 010}]\n')
    named = SentenceTransformersTeacherConfig('x', 'document')
    for args, expected in (
        ([model, folder], 'runs/stage1/teacher'), ([folder, model, 'teacher.prompt_name=document'], named),
        ([model, both], ['runs/stage1/teacher', LLMTeacherConfig('010')]),
        ([both, model, 'teacher.prompt_name=document'], named),
        ([model, 'teacher.type=llm', 'teacher.pretrained=1.10', 'teacher.pooling=last'],
         LLMTeacherConfig('1.10', pooling='last')),
        ([model, 'teacher=null'], None),
    ):
        config = load_config(Stage2Config, [*args, *REQUIRED])
        assert config.teacher == expected
        save_config(config, tmp_path)
        assert read_config(Stage2Config, tmp_path) == config


@pytest.mark.parametrize(('text', 'key', 'line', 'message'), [
    ('seed: 1\nmodel:\n  adapter:\n    dept: 2', 'model.adapter.dept', 4, "unknown key; did you mean 'depth'?"),
    ('train_data:\n  streams:\n    cc3m: {locale: x}', 'train_data.streams.cc3m.locale', 3, "did you mean 'local'?"),
    ('xyz: 1', 'xyz', 1, 'valid are algorithms, '), ('seed: many', 'seed', 1, "'many', expected integer"),
    ('teacher: {type: x}', 'teacher', 1, 'expected the folder of a teacher, or a mapping with the type llm or'),
    ('teacher: {type: llm, pretrained: x, name: y}', 'teacher.name', 1, "'y', expected none"),
    ('teacher:\n- x\n- {type: llm, pretrained: x, poolin: y}', 'teacher[1].poolin', 3, "did you mean 'pooling'?"),
    ('train_data:\n  streams:\n    s:\n      embeddings: [a]', 'train_data.streams.s.embeddings', 4,
     "['a'], expected a mapping of keys to values"),
    ('teacher:\n- x\n- {type: llm, pretrained: x, max_length: 0}', 'teacher[1].max_length', 3, 'at least 1'),
])
def test_an_error_names_key_file_and_line(text: str, key: str, line: int, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / 'a.yaml', f'{text}\n')
    error = _refusal(path, *REQUIRED)
    assert (error.key, error.place) == (key, f'{path}:{line}') and message in str(error)


def test_settings_that_an_older_version_lacks_have_their_defaults() -> None:
    config = load_config(Stage2Config, REQUIRED)
    settings = json.loads(json.dumps(learned_settings(config)))
    del settings['layer_decay'], settings['loss']['arguments'], settings['train_data']['streams']['s']['repeat']
    check_settings(settings, config, 'the run')
    for change, difference in (('layer_decay=0.5', 'layer_decay is 1.0, expected 0.5'), ('seed=3', 'seed is 17'),
                               ('train_data.streams.s.repeat=2', 'train_data.streams.s.repeat is None')):
        with refused_at('save_folder', difference):
            check_settings(settings, load_config(Stage2Config, [*REQUIRED, change]), 'the run')
    with refused_at('save_folder', 'loss.gone is 1, expected None'):  # of a version that had more
        check_settings(settings | {'loss': {'gone': 1}}, config, 'the run')


def test_an_error_of_the_command_line_says_so() -> None:
    error = _refusal(*REQUIRED, 'sed=3')
    assert (error.key, error.place) == ('sed', 'command line')
    # Not `checkpoint_folder`, whose value is in `save_folder` by default.
    error = _refusal(*[arg for arg in REQUIRED if not arg.startswith(('global', 'save_folder'))])
    assert str(error) == 'required but not set: global_train_batch_size, save_folder (in command line)'
    assert _refusal(*REQUIRED, 'teacher={type: llm}').key == 'teacher.pretrained'


@pytest.mark.parametrize('value', ['010', 'no', '12:30', '1.10', 'true'])
def test_a_text_stays_as_it_is_written(value: str, tmp_path: Path) -> None:
    path = _write(tmp_path / 'a.yaml', f'save_folder: {value}\ntrain_data: {{caption_weights: {{{value}: 1}}}}\n')
    config = load_config(Stage2Config, [path, *REQUIRED[2:], f'run_name={value}'])
    assert (config.save_folder, config.run_name, [*config.train_data.caption_weights]) == (value, value, [value])
    save_config(config, tmp_path)
    assert read_config(Stage2Config, tmp_path) == config


def test_a_name_with_a_dot_stands_in_brackets() -> None:
    streams = 'train_data.streams[a.b].embeddings'
    config = load_config(Stage2Config, [*REQUIRED, f'{streams}[llama3.1_8b].local=x',
                                        'train_data.streams[a.b].local=z'])
    stream = config.train_data.streams['a.b']
    assert (stream.local, stream.embeddings['llama3.1_8b'].local) == ('z', 'x')


def test_numbers_are_decimal(tmp_path: Path) -> None:
    config = load_config(Stage2Config, [*REQUIRED, 'train_data.num_workers=010', 'optimizer.lr=1e-4', 'layer_decay=.5'])
    assert (config.train_data.num_workers, config.optimizer['lr'], config.layer_decay) == (10, 1e-4, 0.5)
    for value in ('1:30', '0x10', '0o17'):
        path = _write(tmp_path / 'a.yaml', f'train_data:\n  num_workers: {value}\n')
        assert _refusal(path, *REQUIRED).key == 'train_data.num_workers'


def test_a_url_with_a_secret_is_refused() -> None:
    for url in ('https://me:word@host', ' s3://KEY:wo/rd@bucket/x', 'local-dir:https://TOKEN@host',
                's3://bucket/x?X-Amz-Signature=TOKEN', 'https://host/a/b?sv=2022&sig=TOKEN'):
        error = _refusal(*REQUIRED, f"train_data.streams.s.remote='{url}'")
        assert error.key == 'train_data.streams.s.remote' and 'put no password' in str(error)
        assert url.strip() not in str(error)
    for url in ('s3://bucket/a@b:c', 'me@host', 'sftp://me@host:22/a', 's3://[::1]:80/a@b', 's3://bucket/what'):
        load_config(Stage2Config, [*REQUIRED, f"train_data.streams.s.remote='{url}'"])


@pytest.mark.parametrize('value', ['${save_folder}', r'"\x24{oc.env:HOME}"', '"$\\\n  {package:this.x}"'])
def test_the_configuration_of_a_run_has_no_interpolation(value: str, tmp_path: Path) -> None:
    save_config(load_config(Stage2Config, REQUIRED), tmp_path)
    path = tmp_path / 'config.yaml'
    path.write_text(path.read_text().replace('run_name: r', f'run_name: {value}'))
    with pytest.raises(ConfigError, match='asks for another value') as error:
        read_config(Stage2Config, tmp_path)
    assert error.value.key == 'run_name'


@pytest.mark.parametrize(('content', 'message'), [
    (b'\x89PNG\r\n\x1a\n\x00\xff', 'cannot be read .*expected a YAML file'),
    (b'title:\n\t- a', 'expected YAML'),
    (b'title: a\ntitle: b', 'expected YAML'),
    (b'title: !!python/object/apply:os.system [ls]', 'expected YAML'),
    (b'title: ' + b'[' * 9000, 'expected YAML'),
    (b'a: &a [x, x]\nb: &b [*a, *a]\ntitle: *b', ''),
    (b'title: ${nowhere}', 'title .*refers to nowhere, which is not set in'),
    (b'title: ${package:nowhere}', 'package nowhere is not installed'),
    (b'1: a', r'^1 \(.*bad.yaml:1\)'),
    (b'title: a\ngalleries: {a: b}', r"^galleries \(.*:2\): \{'a': 'b'\}, expected a list$"),
    (b'- a', 'expected a mapping of keys to values at the top'),
], ids=range(11))
def test_a_bad_file_is_refused_by_its_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / 'bad.yaml').write_bytes(content)
    with pytest.raises((ConfigError, FileError), match=message) as error:
        load_config(SCHEMAS['report'], [str(tmp_path / 'bad.yaml'), *OF_RECIPE['report']])
    assert 'bad.yaml' in str(error.value) and '\n' not in str(error.value)
