# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The command that each step names next is one that works, and a stopped one says how it goes on."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from launched import ROOT
from parts import make_samples, write_dataset
from recipes_in_process import SCHEMAS

from llm2clip.config import (
    DatasetConfig,
    EvaluateConfig,
    ExtractConfig,
    ImageStreamConfig,
    InheritanceConfig,
    PrepareConfig,
    ReportConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    TrainConfig,
)
from llm2clip.config.files import load_config
from llm2clip.registry import build_retrieval_set
from llm2clip.steps import goes_on, next_command, step_folder
from llm2clip.training.trainer import check_train_config

TRAIN = ['run_name=r', 'max_duration=1ep', 'global_train_batch_size=8', 'optimizer.lr=1e-3',
         'train_data.streams.p.local=data']


def _next(schema: Any, *args: str) -> tuple[str, Any]:
    """The recipe that comes next and its configuration."""
    command = next_command(load_config(schema, args))
    assert command is not None
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith('recipes/'))
    assert words[:at] == ['python'] or words[:at] == ['composer', '-n', '1']
    recipe = Path(words[at]).stem
    config = load_config(SCHEMAS[recipe], words[at + 1:])
    if isinstance(config, TrainConfig):
        check_train_config(config)
    return recipe, config


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_dataset(make_samples(4), tmp_path / 'photos')
    return tmp_path / 'photos'


def test_from_data_to_the_search(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = f'{prepared}/train'
    recipe, stage1 = _next(PrepareConfig, f'out={prepared}', 'source.name=image_folder')
    assert recipe == 'train_stage1' and stage1.train_data.streams['captions'].local == photos
    assert stage1.train_data.pairs[0].query == ['long', 'short'] and stage1.eval_data is None
    (prepared / 'train').rename(prepared / 'heldout')
    (prepared / 'train').symlink_to(prepared / 'heldout')
    recipe, stage1 = _next(PrepareConfig, f'out={prepared}', 'source.name=image_folder')
    assert stage1.eval_data.streams['heldout'].local == f'{prepared}/heldout'

    recipe, extract = _next(Stage1Config, *TRAIN, 'text_encoder.pretrained=x', 'save_folder=runs/s1',
                            f'train_data.streams.p.local={photos}')
    assert recipe == 'extract_embeddings' and extract.teacher == 'runs/s1/teacher'
    assert extract.datasets == {'p': DatasetConfig(photos)}

    recipe, stage2 = _next(ExtractConfig, 'teacher=runs/s1/teacher', 'out=runs/embeddings', 'out_remote=s3://b/e/',
                           f'datasets.p.local={photos}', 'datasets.p.remote=s3://b/p')
    assert recipe == 'train_stage2' and stage2.teacher == 'runs/s1/teacher' and stage2.save_folder == 'runs/stage2'
    assert stage2.train_data.caption_mix == {'long': 1.0, 'short': 1.0}
    assert stage2.train_data.streams == {'p': ImageStreamConfig(
        photos, 's3://b/p', embeddings={'teacher': DatasetConfig('runs/embeddings/p', 's3://b/e/p')})}
    # Images for tests are neither trained on nor measured while training.
    for name in ('a_b', 'test', 'val'):
        (prepared / name).symlink_to(prepared / 'heldout')
    recipe, stage1 = _next(PrepareConfig, f'out={prepared}', 'source.name=flickr8k')
    assert stage1.eval_data.streams['heldout'].local == f'{prepared}/val'
    recipe, stage2 = _next(ExtractConfig, 'teacher=t', 'out=e', *(
        f'datasets.{name}.local={photos}' for name in ('test', 'train', 'val')))
    assert list(stage2.train_data.streams) == ['train'] and list(stage2.eval_data.streams) == ['val']
    assert stage2.eval_data.streams['val'].embeddings['teacher'].local == 'e/val'

    recipe, evaluate = _next(Stage2Config, *TRAIN, 'model.vision.name=x', 'save_folder=runs/s2', 'teacher=t',
                             f'eval_data.streams.h.local={photos}')
    assert recipe == 'evaluate' and evaluate.models['ours'].run == 'runs/s2' and evaluate.out == 'runs/s2/evaluate'
    build_retrieval_set(evaluate.retrieval['heldout'].source, 'retrieval.heldout.source')

    recipe, export = _next(EvaluateConfig, 'models.m.run=runs/s2', 'models.m.teacher=t', 'models.m.weights=best',
                           'out=runs/e', 'models.base.pretrained=clip', 'retrieval.r.source.name=coco')
    assert recipe == 'export_hf' and (export.run, export.teacher, export.weights, export.results) == \
        ('runs/s2', 't', 'best', 'runs/e') and export.interpolate == 1
    recipe, export = _next(EvaluateConfig, 'models.m.run=runs/s2', 'models.m={interpolate: 0.3, dim: 64}',
                           'out=runs/e', 'retrieval.r.source.name=coco')
    assert (export.interpolate, export.dim) == (0.3, 64)
    recipe, search = _next(SCHEMAS['export_hf'], 'run=r', 'teacher=t', 'out=runs/export')
    assert recipe == 'search' and search.model == 'runs/export/llm2clip'

    # Teachers of other kinds are named as they were.
    named = ['sentence_transformer=org/name', "prompt='query: '", 'trust_remote_code=true']
    recipe, stage2 = _next(ExtractConfig, *named, 'out=e', f'datasets.p.local={photos}')
    assert (stage2.sentence_transformer, stage2.prompt, stage2.trust_remote_code) == ('org/name', 'query: ', True)
    recipe, evaluate = _next(Stage2Config, *TRAIN, 'model.vision.name=x', 'save_folder=runs/s2', *named)
    assert evaluate.models['ours'].named_by() is None and evaluate.models['ours'].trust_remote_code
    recipe, search = _next(SCHEMAS['export_hf'], 'run=r', *named, 'out=runs/export')
    assert search.trust_remote_code
    llm = {'pretrained': 'an/llm', 'bidirectional': False}
    recipe, export = _next(EvaluateConfig, 'models.m.run=r', f'models.m.text_encoder={json.dumps(llm)}', 'out=e',
                           'retrieval.r.source.name=coco')
    assert export.text_encoder == TextEncoderConfig(**llm) and export.named_by() == 'text_encoder'

    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    command = next_command(load_config(ExtractConfig, ['teacher=t', 'out=o', f'datasets.p.local={photos}']))
    assert command is not None and command.startswith('composer -n 8 recipes/train_stage2.py')
    command = next_command(load_config(Stage2Config, [*TRAIN, 'model.vision.name=x', 'save_folder=runs/s2']))
    assert command is not None and command.startswith('composer -n 8 recipes/evaluate.py')


def test_by_way_of_inheritance(prepared: Path, tmp_path: Path) -> None:
    recipe, inheritance = _next(ExtractConfig, 'clip_text=openai/clip', 'out=runs/clip',
                                f'datasets.p.local={prepared}/train')
    stream = inheritance.train_data.streams['p']
    assert recipe == 'train_inheritance' and stream.embeddings == {
        'clip_text': DatasetConfig('runs/clip/p'), 'teacher': DatasetConfig('TEACHER_SIDECAR')}
    (tmp_path / 'i/adapter').mkdir(parents=True)
    (tmp_path / 'i/adapter/adapter.json').write_text('{"embed_dim": 512}')
    recipe, stage2 = _next(InheritanceConfig, *TRAIN, f'save_folder={tmp_path}/i', 'teacher=t',
                           'train_data.streams.p.embeddings={clip_text: {local: a}, llm: {local: b}}')
    assert recipe == 'train_stage2' and stage2.initial_adapter == f'{tmp_path}/i/adapter'
    assert (stage2.model.visual_projection, stage2.model.embed_dim, stage2.teacher) == ('pretrained', 512, 't')
    assert stage2.train_data.streams['p'].embeddings == {'llm': DatasetConfig('b')}


def test_other_ways_through_the_pipeline(text_pairs_dataset: Path, tmp_path: Path) -> None:
    # One caption per image makes no pair: a teacher from elsewhere.
    single = make_samples(2)
    for sample in single:
        del sample.captions['long']
    write_dataset(single, tmp_path / 'one')
    recipe, extract = _next(PrepareConfig, f'out={tmp_path}/one', 'source.name=table')
    assert recipe == 'extract_embeddings' and extract.datasets['train'].local == f'{tmp_path}/one/train'
    recipe, stage1 = _next(PrepareConfig, f'out={text_pairs_dataset.parent}', 'source.name=text_pairs')
    assert recipe == 'train_stage1' and stage1.train_data.pairs[0].positive == ['positive']
    recipe, stage1 = _next(Stage1Config, *TRAIN, 'text_encoder.pretrained=llm', 'save_folder=runs/mntp',
                           'objective=mntp', 'train_data.streams.w.local=w', 'train_data.texts={a: 1.0, b: 1.0}')
    assert recipe == 'train_stage1' and stage1.objective == 'contrastive'
    assert stage1.text_encoder.adapters == ['runs/mntp/adapter'] and stage1.text_encoder.gguf_file is None
    # Texts alone serve stage 1 only.
    recipe, extract = _next(Stage1Config, *TRAIN, 'text_encoder.pretrained=x', 'save_folder=runs/s1',
                            f'train_data.streams.t.local={text_pairs_dataset}', 'train_data.streams.p.local=nowhere')
    assert list(extract.datasets) == ['p']
    recipe, evaluate = _next(Stage2Config, *TRAIN, 'model.vision.name=x', 'save_folder=runs/s2')
    assert evaluate.models['ours'].teacher == 'TEACHER'
    for arguments, expected in ((['checkpoint=c', 'teacher=t', 'vision.name=x'], 'evaluate'),
                                (['text_encoder.pretrained=x'], 'extract_embeddings')):
        assert _next(SCHEMAS['import_official'], 'out=o', *arguments)[0] == expected


def test_a_folder_with_a_file_for_every_step_goes_on_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = ['yamls/own/prepare.yaml']
    while (command := next_command(None, files)) is not None:
        assert (ROOT / command.split()[-1]).read_text().splitlines()[0] == f'# {command}'
        files = [command.split()[-1]]
    assert files == ['yamls/own/report.yaml']
    moved = ['yamls/own/stage1.yaml', 'save_folder=runs/elsewhere']
    command = next_command(load_config(Stage1Config, moved), moved)
    assert command is not None and 'teacher=runs/elsewhere/teacher' in command


def test_the_end_of_the_pipeline_and_unfinished_data_name_no_command(tmp_path: Path) -> None:
    assert next_command(load_config(PrepareConfig, [f'out={tmp_path}', 'source.name=x'])) is None
    evaluate = ['models.m.export=x', 'out=o', 'retrieval.r.source.name=coco']
    assert next_command(load_config(EvaluateConfig, evaluate)) is None
    assert next_command(load_config(ReportConfig, ['results=r', 'out=o', 'steps.a=b'])) is None


def test_how_a_stopped_step_goes_on(tmp_path: Path) -> None:
    args = [*TRAIN, 'model.vision.name=x', f'save_folder={tmp_path}']
    assert 'from the beginning' in goes_on(load_config(Stage2Config, args))
    checkpoints = tmp_path / 'checkpoints'
    checkpoints.mkdir()
    for name in ('ep0-ba120-rank0.pt', 'ep1-ba240'):
        (checkpoints / 'latest-rank0.pt').unlink(missing_ok=True)
        (checkpoints / 'latest-rank0.pt').symlink_to(name)
        batch = name.split('-')[1].removeprefix('ba')
        assert goes_on(load_config(Stage2Config, args)) == f'the same command goes on from batch {batch}'
    assert 's3://b/c' in goes_on(load_config(Stage2Config, [*args, 'checkpoint_folder=s3://b/c']))
    assert goes_on(load_config(Stage2Config, [*args, 'autoresume=false'])) == ''
    assert goes_on(load_config(ReportConfig, ['results=r', 'out=o', 'steps.a=b'])) == ''


def test_every_step_that_writes_a_folder_of_its_own_keeps_its_seconds_there() -> None:
    for recipe, schema in SCHEMAS.items():
        names = {field.name for field in fields(schema)}
        config = schema(**{name: name for name in ('out', 'save_folder') if name in names})
        kept = step_folder(config)
        # These write what others read, or nothing.
        assert kept is None if recipe in ('report', 'search', 'export_vision') else kept in ('out', 'save_folder')
