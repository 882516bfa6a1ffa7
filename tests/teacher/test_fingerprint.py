# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fingerprints of teachers: compared, concatenated, written and read; what is part of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from recipes_in_process import run_recipe
from safetensors.torch import save_file
from towers import HALF, timm_tower
from transformers import AutoTokenizer

from llm2clip.config import LLMTeacherConfig, VisionConfig
from llm2clip.errors import ConfigError
from llm2clip.models.frozen_tower import tower_fingerprint
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.teacher.clip_text import ClipText
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord, hash_files, hash_settings
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.teacher.sources import FrozenLLM

ONE = Fingerprint.of('a1', {'pooling': 'mean', 'instruction': ''})
OTHER = Fingerprint.of('b2', {'pooling': 'last', 'instruction': ''})
BOTH = Fingerprint.concatenate([ONE, OTHER])


def test_the_first_differing_field_is_named() -> None:
    ONE.check(Fingerprint.of('a1', {'pooling': 'mean', 'instruction': ''}), 'a', 'b')
    OTHER.check(ONE, 'a', 'b', ignored=['weights', 'pooling'])
    with pytest.raises(ValueError, match="a comes from another teacher than b: pooling is 'last', expected 'mean'"):
        OTHER.check(ONE, 'a', 'b')
    with pytest.raises(ValueError, match="teacher 1.pooling is 'last', expected 'mean'"):
        Fingerprint.concatenate([OTHER, ONE]).check(BOTH, 'a', 'b')
    with pytest.raises(ValueError, match='teacher 2 is None'):
        ONE.check(BOTH, 'a', 'b')


def test_a_record_comes_back_and_tells_others_apart(tmp_path: Path) -> None:
    assert ONE.to_json()['weights'] == 'a1' and len(BOTH) == 2 and list(BOTH) == [ONE, OTHER]
    for teacher in (ONE, BOTH):
        record = TeacherRecord(teacher, {'llm_embed_dim': 8})
        record.write(tmp_path)
        assert TeacherRecord.read(tmp_path) == record and record.llm_embed_dim == 8
    assert record.difference(TeacherRecord(BOTH, {'llm_embed_dim': 4})) == 'llm_embed_dim is 8, expected 4'
    named = TeacherRecord(ONE, {}).difference(TeacherRecord(OTHER, {}))
    assert named == "teacher.pooling is 'mean', expected 'last'"
    with pytest.raises(ConfigError, match='has no teacher.json'):
        TeacherRecord.read(tmp_path / 'nowhere')


@pytest.mark.parametrize('pattern', ['*.safetensors', '*.jinja', 'tokenizer.json', 'config.json'])
def test_every_file_of_a_teacher_is_in_its_fingerprint(teacher_folder: Path, tmp_path: Path, pattern: str) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / 'copy')
    whole = teacher_fingerprint(folder)
    file, = folder.glob(pattern)
    file.write_bytes(file.read_bytes() + b' ')
    with pytest.raises(ValueError, match='weights is'):
        teacher_fingerprint(folder).check(whole, 'a', 'b')


@pytest.mark.parametrize(('kind', 'file', 'keys', 'value'), [
    ('llm', 'config.json', ['rms_norm_eps'], 0.5),
    ('llm', 'config.json', ['rope_parameters', 'rope_theta'], 50.0),
    ('llm', 'tokenizer.json', ['model', 'merges'], []),
    ('clip_text', 'config.json', ['text_config', 'hidden_act'], 'relu'),
    ('clip_text', 'tokenizer.json', ['model', 'merges'], []),
    ('frozen_tower', 'config.json', ['vision_config', 'hidden_act'], 'relu'),
])
def test_configuration_and_tokenizer_are_part_of_it(
    kind: str, file: str, keys: list[str], value: object, llm_folder: Path, clip: Path, tmp_path: Path
) -> None:
    fingerprint: Callable[[Path], Fingerprint] = {
        'llm': lambda folder: FrozenLLM(LLMTeacherConfig(str(folder))).fingerprint(),
        'clip_text': lambda folder: ClipText(folder).fingerprint(),
        'frozen_tower': lambda folder: tower_fingerprint(VisionEncoder(VisionConfig(str(folder), image_size=32))),
    }[kind]
    source = llm_folder if kind == 'llm' else clip
    expected = fingerprint(shutil.copytree(source, tmp_path / 'copy'))
    assert fingerprint(source) == expected
    assert Fingerprint.from_json(expected.to_json()).kinds == [kind]
    about = json.loads((tmp_path / 'copy' / file).read_text())
    inner = about
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / 'copy' / file).write_text(json.dumps(about))
    with pytest.raises(ValueError, match='a comes from another t[a-z]+ than b: config'):
        fingerprint(tmp_path / 'copy').check(expected, 'a', 'b')


@pytest.mark.parametrize('token', ['bos_token', 'eos_token', 'pad_token'])
def test_special_tokens_are_part_of_it(token: str, llm_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    before = hash_settings({}, tokenizer)
    setattr(tokenizer, token, 'a')
    assert hash_settings({}, tokenizer) != before


def test_timm_towers_with_equal_weights_differ(tmp_path: Path) -> None:
    """Other paddings and another epsilon of BatchNorm are in the name alone; feature levels are no weights."""
    save_file(timm.create_model('efficientnet_lite0').state_dict(), tmp_path / 'weights.safetensors')

    def fingerprint(name: str, levels: int) -> Fingerprint:
        tower = timm_tower(name, checkpoint=f'{tmp_path}/weights.safetensors', feature_levels=levels, **HALF)
        return tower_fingerprint(VisionEncoder(tower))

    plain, tf, levels = (
        fingerprint(*tower)
        for tower in [('efficientnet_lite0', 0), ('tf_efficientnet_lite0', 0), ('efficientnet_lite0', 2)])
    assert plain.teachers[0]['weights'] == tf.teachers[0]['weights'] == levels.teachers[0]['weights']
    assert plain != tf and plain != levels


def test_a_folder_has_the_hash_of_what_decides_its_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'model'
    (folder / 'inner').mkdir(parents=True)
    for name, text in {'model.safetensors': 'weights', 'config.json': '{}', 'inner/a.txt': 'a', 'a.png': 'x'}.items():
        (folder / name).write_text(text)
    first = hash_files(folder)
    monkeypatch.chdir(tmp_path)
    (folder / 'a.png').write_text('another picture')
    assert first == hash_files('model') == 'bbd62b6daf7b1415'
    without = hash_files(folder, exclude='config.json')
    (folder / 'config.json').unlink()
    assert without == hash_files(folder) != first
    (folder / 'model.safetensors').write_text('Weights')
    assert hash_files(folder) != without


def test_an_export_has_the_same_hash_each_time(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for _ in range(2):
        run_recipe(monkeypatch, 'export_sentence_transformers', f'teacher={teacher_folder}', f'out={tmp_path}/out')
        hashes.add(hash_files(tmp_path / 'out'))
    assert len(hashes) == 1
