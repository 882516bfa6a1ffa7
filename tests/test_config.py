# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration: merging, and errors that name key, file and nearest valid name."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Optional

import pytest
from composer.utils import dist
from recipes_in_process import REQUIRED as OF_RECIPE

from llm2clip.config import LLMTeacherConfig, SentenceTransformersTeacherConfig, Stage1Config, Stage2Config
from llm2clip.config.loading import load_config, read_config, save_config
from llm2clip.errors import ConfigError
from llm2clip.registry import build, build_source, check_names
from llm2clip.training.trainer import check_train_config

REQUIRED, STAGE1 = OF_RECIPE['train_stage2'], OF_RECIPE['train_stage1']


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    a = _write(tmp_path / 'a.yaml', 'seed: 1\nmodel: {embed_dim: 8, adapter: {depth: 2}}\n')
    b = _write(tmp_path / 'b.yaml', 'seed: 2\nmodel: {embed_dim: 16}\n')
    config = load_config(Stage2Config, [a, b, *REQUIRED, 'model.adapter.expansion=3'])
    assert (config.seed, config.model.embed_dim, config.model.adapter.depth, config.model.adapter.expansion) == \
        (2, 16, 2, 3)
    path = _write(tmp_path / 'c.yaml', "text_encoder: {instruction: 'Find it: '}\n")
    assert load_config(Stage1Config, [path, *STAGE1, 'text_encoder.instruction=']).text_encoder.instruction == ''


def test_null_takes_an_entry_of_a_mapping_away(tmp_path: Path) -> None:
    base = _write(tmp_path / 'a.yaml', 'train_data: {streams: {a: {local: x}, b: {local: y}, c: {local: z}}}\n')
    path = _write(tmp_path / 'b.yaml', 'train_data: {streams: {b: null, other: null}}\n')
    config = load_config(Stage1Config, [base, path, *STAGE1, 'train_data.streams.c=null'])
    assert list(config.train_data.streams) == ['a', *load_config(Stage1Config, STAGE1).train_data.streams]
    # So it is with arguments of parts and with numbers, and with a mapping as a whole.
    config = load_config(Stage2Config, [*REQUIRED, 'algorithms.ema={}', 'algorithms.clamp_logit_scale=null',
                                        'lr_scale={adapter: 2, logit_scale: 1}', 'lr_scale.adapter=null',
                                        'loggers.wandb.project=p', 'loggers=null', 'train_data.caption_weights=null'])
    assert (config.algorithms, config.lr_scale, config.loggers) == ({'ema': {}}, {'logit_scale': 1}, {})


def test_a_text_encoder_of_another_type_replaces_the_one_of_earlier_files(tmp_path: Path) -> None:
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


def test_what_is_wrong_with_a_text_encoder_names_its_field(tmp_path: Path) -> None:
    path = _write(tmp_path / 'a.yaml', 'teacher:\n- x\n- type: llm\n  pretrained: x\n  poolin: last\n')
    with pytest.raises(ConfigError, match='unknown key, expected one of pretr') as error:
        load_config(Stage2Config, [path, *REQUIRED])
    assert (error.value.key, error.value.place) == ('teacher[1].poolin', f'{path}:5')
    for value, message in (
        ('{type: x}', r"teacher\.type \(.*\): 'x', expected 'llm' or 'sentence_transformers'$"),
        ('{type: llm}', r'teacher\.pretrained: required but not set'),
        ('{type: llm, pretrained: x, max_length: 0}', r'teacher\.max_length \(.*\): 0, expected at least 1$'),
        ('{type: sentence_transformers, name: x, prompt_name: a, prompt: b}', r'teacher\.prompt \(.*expected none'),
    ):
        with pytest.raises(ConfigError, match=f'^{message}'):
            load_config(Stage2Config, [*REQUIRED, f'teacher={value}'])


@pytest.mark.parametrize(('text', 'message'), [
    ('seed: 1\nmodel:\n  adapter:\n    dept: 2', r'model\.adapter\.dept \(.*:4\).*did you mean model\.adapter\.depth'),
    ('train_data:\n  streams:\n    cc3m: {locale: x}', r'train_data\.streams\.cc3m\.locale .*did you mean .*local\?'),
    ('seed: many', r"seed \(.*a\.yaml:1\).*'many'"),
    ('train_data:\n  streams:\n    s:\n      embeddings: [a]', r"embeddings \(.*a\.yaml:4\): .*a mapping of keys"),
    ('global_train_batch_size: ???', 'required but not set: global_train_batch_size')])
def test_an_unknown_key_a_wrong_type_and_a_missing_one_are_named(text: str, message: str, tmp_path: Path) -> None:
    path, required = _write(tmp_path / 'a.yaml', f'{text}\n'), [arg for arg in REQUIRED if 'global' not in arg]
    with pytest.raises(ConfigError, match=message):
        load_config(Stage2Config, [path, *required, *([] if 'global' in text else ['global_train_batch_size=8'])])
    with pytest.raises(ConfigError, match=r'sed \(command line\).*did you mean seed'):
        load_config(Stage2Config, [*REQUIRED, 'sed=3'])


@pytest.mark.parametrize('value', ['2024_11_05', '010', 'no', '12:30'])
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
        with pytest.raises(ConfigError, match=r'^train_data\.num_workers \(.*a\.yaml:2\): '):
            load_config(Stage2Config, [path, *REQUIRED])


@pytest.mark.parametrize('url', ['https://me:word@host', ' s3://KEY:wo/rd@bucket/x', 'local-dir:https://TOKEN@host',
                                 's3://bucket/x?X-Amz-Signature=TOKEN', 'https://host/a/b?sv=2022&sig=TOKEN'])
def test_a_url_with_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r'^train_data\.streams\.s\.remote .*put no password') as error:
        load_config(Stage2Config, [*REQUIRED, f"train_data.streams.s.remote='{url}'"])
    assert url.strip() not in str(error.value)


@pytest.mark.parametrize('text', ['s3://bucket/a@b:c', 'me@host', 'sftp://me@host:22/a', 's3://[::1]:80/a@b',
                                  's3://bucket/what?'])
def test_a_url_without_a_secret_is_none(text: str) -> None:
    load_config(Stage2Config, [*REQUIRED, f"train_data.streams.s.remote='{text}'"])


@pytest.mark.parametrize('value', ["'${oc.env:HOME}'", '${save_folder}', r'"\x24{oc.env:HOME}"', "'${oc.env:'",
                                   '"$\\\n  {package:this.x}"'])
def test_what_a_run_wrote_asks_for_nothing_from_outside(value: str, tmp_path: Path) -> None:
    save_config(load_config(Stage2Config, REQUIRED), tmp_path)
    path = tmp_path / 'config.yaml'
    path.write_text(path.read_text().replace('run_name: r', f'run_name: {value}'))
    with pytest.raises(ConfigError, match=r'config\.yaml:2: .*\$\{.* asks for another value'):
        read_config(Stage2Config, tmp_path)


@pytest.mark.parametrize(('override', 'message'), [
    ('compile.bakend=inductor', r'compile.bakend: torch.compile takes no such argument.*backend'),
    ('device_train_microbatch_size=4', r'device_train_microbatch_size.*negatives'),
    ('algorithms.channels_last={}', r'algorithms.channels_last .*: '), ('precision=amp_bf16', r'precision: amp_bf16'),
])
def test_parts_are_checked_before_anything_is_loaded(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_train_config(load_config(Stage2Config, [*REQUIRED, 'fsdp={}', 'device=cpu', override]))


@pytest.mark.parametrize(('keys', 'message'), [
    ('replicate: 2, reshard_after_forward: 2', None),
    ('replicate: 3', r'fsdp.replicate: 3 .* divides that of the ranks, 8'),
    ('replicate: 2, reshard_after_forward: 8', r'fsdp.reshard_after_forward: 8 .* copy of the model, 4'),
])
def test_numbers_of_ranks_go_together(keys: str, message: Optional[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, 'get_world_size', lambda: 8)
    config = load_config(Stage2Config, [*REQUIRED, f'fsdp={{{keys}}}', 'global_train_batch_size=24',
                                        'global_eval_batch_size=24'])
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_train_config(config)


def test_a_part_of_the_users_own_is_found_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    check_names(load_config(Stage2Config, REQUIRED))
    assert str(tmp_path) not in sys.path  # unless it is asked for
    Path('own_part.py').write_text('def source(folder: str, seed: int = 0):\n    return folder, seed\n')
    assert build_source({'name': 'own_part:source', 'folder': 'x', 'seed': 3}) == ('x', 3)
    for source, message in (
            ({'name': 'own_part:source', 'sed': 3}, r"source\.sed: .* did you mean 'seed'\?"),
            ({'name': 'own_part:source', 'seed': 'x'}, r"source\.seed: 'x', expected"),
            ({'name': 'own_part:sauce'}, 'source: .*own_part.* has no attribute'),
            ({'name': 'no_such_part:source'}, 'source: .*no_such_part')):
        with pytest.raises(ConfigError, match=message):
            build_source(source)


OWN_PARTS = """from shutil import rmtree
from composer import Callback

class Broken(Callback):
    def __init__(self):
        raise KeyError('x')

def source():
    return 1 / 0
"""


@pytest.mark.parametrize(('kind', 'name', 'message'), [
    ('algorithms', 'os:system', 'os:system, expected'), ('optimizer', 'own_parts:source', 'own_parts:source, expected'),
    ('scheduler', 'own_parts:Broken', 'own_parts:Broken, expected'),
    ('callbacks', 'own_parts:Broken', r'.*own_parts\.py:6: KeyError'), ('callbacks', 'ends:A', r'.*ends\.py:2: System'),
    ('callbacks', 'unfinished:A', r'.*unfinished\.py, line 1'),
    ('source', 'own_parts:source', r'.*own_parts\.py:9: Zero'), ('source', 'own_parts:rmtree', '.*:rmtree, expected'),
    ('zeroshot', 'os:system', 'os:system, expected'), ('source', 'subprocess:call', 'subprocess:call, expected'),
])
def test_a_part_of_another_kind_is_never_called(
    kind: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a module of the user's, and an exit too, is one line with that of the module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'own_parts', raising=False)
    Path('own_parts.py').write_text(OWN_PARTS)
    Path('ends.py').write_text('import sys\nsys.exit()\n')
    Path('unfinished.py').write_text('def part(:\n')
    arguments = {'os:system': {'command': 'touch called'}, 'subprocess:call': {'args': ['touch', 'called']}}
    with pytest.raises(ConfigError, match=f'^{kind}: {message}') as error:
        build(kind, name, arguments.get(name, {}))
    assert not Path('called').exists() and '\n' not in str(error.value)


@pytest.mark.parametrize(('overrides', 'message'), [
    (['device_train_microbatch_size=4'], 'device_train_microbatch_size.*grad_cache'),
    (['objective=mntp', 'algorithms.grad_cache={}'], 'algorithms.grad_cache .*: objective mntp'),
    (['fsdp={}', 'text_encoder.dtype=bfloat16'], 'text_encoder.dtype .*: bfloat16 does not go with fsdp'),
    (['objective=mntp', 'eval_data.streams.s.local=d'], 'eval_data .*: objective mntp'),
])
def test_stage1_is_checked_before_anything_is_loaded(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_train_config(load_config(Stage1Config, [*STAGE1, *overrides]))
