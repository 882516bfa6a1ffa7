# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Damaged weights and configurations: every way that leads to a result refuses them, and names the file."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from damage import BYTES, CPU, TEXTS, WAYS, WEIGHTS, Damage, cut, edited, once_each, refused, spoilt, weights, written
from disks import flip
from official_parts import HALF, eva_state, save_eva
from parts import text_encoder_from_config
from safetensors.torch import save_file
from towers import SMALL
from trained import save_run_config, trained
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm2clip.config import (
    EvaluatedModelConfig,
    LoraConfig,
    SentenceTransformersTeacherConfig,
    TextEncoderConfig,
    VisionConfig,
)
from llm2clip.evaluation.evaluated_models import load_evaluated_model
from llm2clip.export.hf import LLM2CLIPConfig, export_folder
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.io.tensors import read_safetensors, write_safetensors
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.towers import load_tower
from llm2clip.official.official_weights import import_checkpoint
from llm2clip.teacher.caption_teacher import CachedTeacher
from llm2clip.teacher.embedder import Embedded
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import load_llm, save_teacher, teacher_config
from llm2clip.teacher.sources import SentenceTransformerModel, TeacherFolder
from llm2clip.training.runs import Stage2Run, load_initial_weights

# Enough to know that a way leads to the checks, all of which are tried with the best weights of a run.
SOME = ('cut', 'nan', 'missing')


# Exports


@pytest.fixture
def export(exported: tuple[LLM2CLIP, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported[1], tmp_path / 'export')


def test_every_way_reads_the_same_of_an_export(export: Path) -> None:
    for way in WAYS.values():
        torch.testing.assert_close(way(export), WAYS['transformers'](export))


@pytest.mark.parametrize(('way', 'damage'), once_each([*WAYS, 'initial weights'], WEIGHTS))
def test_weights_of_an_export(way: str, damage: str, export: Path, teacher_folder: Path) -> None:
    edited(weight_files={})(export / 'config.json')  # the checksum alone would find all of it
    WEIGHTS[damage](export / 'model.safetensors')

    def load_initial(folder: Path) -> Any:
        model, config, record, _ = trained('timm:test_efficientnet', [teacher_folder], image_size=32, embed_dim=16)
        return load_initial_weights(model, config, record.teacher, folder)

    refused(lambda: {**WAYS, 'initial weights': load_initial}[way](export), str(export))


def _pickled(path: Path) -> None:
    torch.save({}, path.with_name('pytorch_model.bin'))
    path.unlink()


def test_a_bit_of_a_file_with_a_hash(tmp_path: Path) -> None:
    tensors = {'b': torch.ones(3, 2, dtype=torch.bfloat16).T, 'a': torch.zeros(0), 'c': torch.tensor(1)}
    write_safetensors(tmp_path / 'x', tensors, {'about': 'it'})
    found = read_safetensors(tmp_path / 'x')
    assert found.metadata['about'] == 'it' and all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    flip(tmp_path / 'x')
    refused(lambda: read_safetensors(tmp_path / 'x'), f'{tmp_path}/x: is damaged')


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    for i in range(20):
        write_safetensors(tmp_path / str(i), {'a': torch.ones(2)}, {'lora': '{}', 'truncated': '3'})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_values_out_of_range(export: Path) -> None:
    edited(max_length=0)(export / 'teacher/text_encoder.json')
    refused(lambda: teacher_config(export / 'teacher'), 'text_encoder.json: max_length: 0, expected at least 1')
    config = LLM2CLIPConfig.from_pretrained(export)
    config.model['adapter'] = {**config.model['adapter'], 'depth': -1}
    refused(config.model_config, 'model.adapter.depth: -1, expected at least 0')


JSON = {**BYTES, 'a list': written(b'[1, 2]')}
ADAPTER = b'{"base_model_name_or_path": "other", "peft_type": "LORA"}'
EXPORT_FILES: dict[str, tuple[str, Damage, str]] = {
    **{f'config, {name}': ('config.json', damage, '') for name, damage in JSON.items()},
    **{f'text_encoder, {name}': ('teacher/text_encoder.json', damage, '') for name, damage in JSON.items()},
    # All that the fingerprint of the teacher finds.
    **{f'{name} of its teacher': (f'teacher/{name}.json', cut, 'teacher')
       for name in ('config', 'tokenizer', 'tokenizer_config')},
    **{f'weights of its teacher, {name}': ('teacher/model.safetensors', WEIGHTS[name], 'teacher') for name in SOME},
    'other weights of its teacher': ('teacher/model.safetensors', spoilt(0.5), 'teacher'),
    'another pooling': ('teacher/text_encoder.json', edited(pooling='last'), 'teacher'),
    'several teachers': ('config.json', edited(teacher={'concatenated': [{}, {}]}), 'teachers'),
    'another width': ('config.json', edited(llm_embed_dim=48), ''),
    'an adapter beside it': ('adapter_config.json', written(ADAPTER), ''),
    'an adapter of the teacher': ('teacher/adapter_config.json', written(ADAPTER), 'teacher'),
    'another template': ('teacher/chat_template.jinja', written(b'{{ messages[0]["content"] }} !'), 'teacher'),
    'pickled weights': ('model.safetensors', _pickled, ''),
    'a bit': ('model.safetensors', flip, 'model.safetensors: is damaged'),
}


@pytest.mark.parametrize(('way', 'damage'), [
    *((way, damage) for way in ('evaluate', 'remote code') for damage in EXPORT_FILES),
    *((way, damage) for way in ('search', 'transformers') for damage in ('a bit', 'other weights of its teacher'))])
def test_files_of_an_export(way: str, damage: str, export: Path) -> None:
    file, change, message = EXPORT_FILES[damage]
    change(export / file)
    refused(lambda: WAYS[way](export), str(export), message)


def test_an_export_compares_its_teacher(teacher_folder: Path, causal_teacher: Path, tmp_path: Path) -> None:
    model, config, record, _ = trained('clip_vision_model', [teacher_folder])
    refused(lambda: export_folder(model, config, record, [causal_teacher], tmp_path / 'out'), 'bidirectional is False')
    assert not (tmp_path / 'out').exists()


# Runs


# What damages a checkpoint is in tests/training/test_checkpoints.py.
RUN_FILES: dict[str, tuple[str, str, Damage]] = {
    **{f'best, {name}': ('best.safetensors', 'best', damage) for name, damage in WEIGHTS.items()},
    **{f'checkpoint, {name}': ('checkpoints/latest-rank0.pt', 'latest', damage) for name, damage in BYTES.items()},
    'checkpoint, no weights': ('checkpoints/latest-rank0.pt', 'latest',
                               lambda path: torch.save({'state': {'model': 7}}, path)),
}


@pytest.mark.parametrize(('way', 'damage'), once_each(['export', 'evaluate'], RUN_FILES))
def test_files_of_a_run(way: str, damage: str, teacher_folder: Path, tmp_path: Path) -> None:
    model, config, record, _ = trained('timm:test_vit', [teacher_folder])
    save_run_config(run := tmp_path / 'run', config, teacher=str(teacher_folder))
    record.write(run)
    state = {f'model.{name}': value.clone() for name, value in model.state_dict().items()}
    save_file(state, run / 'best.safetensors')
    (run / 'checkpoints').mkdir()
    torch.save({'state': {'model': state}}, run / 'checkpoints/latest-rank0.pt')
    file, kept, change = RUN_FILES[damage]

    def load() -> object:
        if way == 'export':
            return Stage2Run(run, kept).load_model()
        return load_evaluated_model(EvaluatedModelConfig(run=str(run), weights=kept), tmp_path / 'cache', CPU)

    load()
    change(run / file)
    refused(load, str(run))


# Teachers


@pytest.fixture(scope='module')
def with_lora(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in bfloat16, with its LoRA weights beside it and an adapter's folder."""
    out = tmp_path_factory.mktemp('lora')
    config = TextEncoderConfig(pretrained=str(llm_folder), max_length=64, dtype='bfloat16')
    save_teacher(*text_encoder_from_config(config, LoraConfig(r=4)), LoraConfig(r=4), out / 'teacher', out / 'adapter')
    return out


TEACHER_FILES = [
    *((f'{file}.safetensors', WEIGHTS[name]) for name in SOME for file in ('model', 'lora')),
    *((file, cut) for file in ('text_encoder.json', 'config.json', 'tokenizer.json')),
    # LoRA of another shape.
    ('lora.safetensors', lambda path: save_file({'x': torch.ones(2)}, path, {'lora': '{"rank": 3}'})),
    ('chat_template.jinja', written(b'always the same')),
]
ADAPTER_FILES = [
    *(('adapter_model.safetensors', WEIGHTS[name]) for name in SOME),
    *((file, cut) for file in ('adapter_config.json', 'base_model.json')),
    *(('adapter_config.json', edited(**fields)) for fields in ({'r': 7}, {'target_modules': ['nobody']})),
    ('base_model.json', edited(fingerprint='0')),  # of another LLM
]


@pytest.mark.parametrize(('way', 'file', 'damage'), [
    *(('extract', *damage) for damage in TEACHER_FILES), ('sentence-transformers', *TEACHER_FILES[0]),
    *(('adapter', *damage) for damage in ADAPTER_FILES)])
def test_files_of_a_teacher_or_its_adapter(
    way: str, file: str, damage: Damage, with_lora: Path, llm_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(with_lora / ('adapter' if way == 'adapter' else 'teacher'), tmp_path / 'copy')
    damage(folder / file)
    ways: dict[str, Any] = {
        'extract': lambda: TeacherFolder(folder).load(CPU).embed(TEXTS),
        'sentence-transformers': lambda: export_sentence_transformers(folder, tmp_path / 'out'),
        'adapter': lambda: load_llm(TextEncoderConfig(pretrained=str(llm_folder), adapters=[str(folder)]))}
    refused(ways[way], str(folder))


@pytest.mark.parametrize('way', WAYS)
def test_files_of_an_exported_sentence_transformer(way: str, embedder: Path, tmp_path: Path) -> None:
    teacher = SentenceTransformerModel(SentenceTransformersTeacherConfig(str(embedder), 'query'))
    of_run = trained('clip_vision_model', [teacher])
    export_folder(*of_run, tmp_path / 'export')
    torch.testing.assert_close(WAYS[way](tmp_path / 'export'), of_run.model.get_text_features(of_run.vectors(TEXTS)))
    for file, damage in (('model.safetensors', spoilt(0.5)), ('1_Pooling/config.json', written(b'{'))):
        export = shutil.copytree(tmp_path / 'export', tmp_path / file.replace('/', '_'))
        damage(export / 'teacher' / file)
        refused(lambda export=export: WAYS[way](export), str(export / 'teacher'), 'expected')


# Towers, official weights


@pytest.mark.parametrize('damage', SOME)
def test_towers_of_timm_and_transformers(damage: str, tmp_path: Path) -> None:
    file = tmp_path / 'tower.safetensors'
    save_file(timm.create_model('test_vit', img_size=32, num_classes=0).state_dict(), file)
    WEIGHTS[damage](file)
    refused(lambda: load_tower(VisionConfig('test_vit', checkpoint=str(file), image_size=32)), str(file))
    CLIPVisionModel(CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path)
    WEIGHTS[damage](tmp_path / 'model.safetensors')
    refused(lambda: load_tower(VisionConfig(str(tmp_path), pretrained=True, image_size=32, **HALF)), str(tmp_path))


@pytest.mark.parametrize('suffix', ['pt', 'safetensors'])
def test_official_weights(suffix: str, tmp_path: Path) -> None:
    file, state = tmp_path / f'official.{suffix}', eva_state()
    state['visual.head.bias'][3] = torch.nan
    save_eva(file, state) if suffix == 'pt' else save_file(state, file)
    refused(lambda: import_checkpoint(file, VisionConfig('tiny_eva_clip', False, image_size=56, **HALF)), str(file))


# What was computed before


def _cached(folder: Path, value: float = 1.0) -> CachedTeacher:
    teacher: Any = SimpleNamespace(embed=lambda texts: Embedded(torch.full((len(texts), 4), value), 2, 0))
    return CachedTeacher(folder, Fingerprint.of('w', {}), 'fp32', lambda: teacher)


@pytest.mark.parametrize('damage', [
    cut, spoilt(float('nan')), weights(lambda state: state.update(other=state.pop('text_embedding'))),
    weights(lambda state: state.update(text_embedding=torch.ones(3, 4)))])
def test_vectors_of_texts(damage: Damage, tmp_path: Path) -> None:
    refused(lambda: _cached(tmp_path, float('nan'))(['a']), 'not finite')
    assert not list(tmp_path.iterdir())
    _cached(tmp_path)(['a', 'b'])
    file, = tmp_path.rglob('*.safetensors')
    damage(file)
    refused(lambda: _cached(tmp_path)(['a', 'b']), str(file), 'expected')


@pytest.mark.parametrize('damage', [cut, edited(teacher={'concatenated': []})])
def test_the_record_of_a_teacher(damage: Damage, tmp_path: Path) -> None:
    file = tmp_path / 'teacher.json'
    file.write_text(json.dumps({'teacher': {'weights': 'w'}, 'llm_embed_dim': 32}))
    damage(file)
    refused(lambda: TeacherRecord.read(tmp_path), str(file), 'expected')
