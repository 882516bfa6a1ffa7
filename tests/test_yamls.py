# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every shipped YAML: the command in its first line loads, its parts exist, and those of stage 1 train."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from omegaconf import OmegaConf
from parts import write_dataset
from recipes_in_process import ROOT, SCHEMAS, run_recipe

from llm2clip.config import ExtractConfig, InheritanceConfig, PrepareConfig, Stage1Config, Stage2Config, TrainConfig
from llm2clip.config.loading import check_settings, learned_settings, leaves, load_config
from llm2clip.data.classification_sets import read_templates
from llm2clip.data.convert.samples import Sample
from llm2clip.data.image_text_dataset import caption_mix
from llm2clip.models.llm2clip import LLM2CLIP, projection_kind
from llm2clip.models.towers import tower_preprocessing
from llm2clip.registry import CLASSIFICATION_SETS, check, named
from llm2clip.training.config_checks import check_metrics, check_train_config
from llm2clip.training.optim import parameter_groups
from llm2clip.training.stage2 import possible_metrics

LAUNCHERS = ['yamls/cluster/skypilot.yaml', 'yamls/cluster/slurm.sbatch']
FILES = sorted({str(path.relative_to(ROOT)) for path in ROOT.glob('yamls/**/*.yaml')} - {*LAUNCHERS})
TOWER, DATA, TEACHER = (sorted(path.stem for path in ROOT.glob(f'yamls/parts/{kind}/*.yaml'))
                        for kind in ('tower', 'data', 'teacher'))
# The rows of the paper's table 1 with LLM2CLIP: tower -> amounts of data.
TABLE_1 = {'clip_b16': ['15m'], 'eva02_b16': ['15m'], 'clip_l14': ['15m'], 'eva02_l14': ['3m', '15m', '60m'],
           'clip_l14_336': ['15m', '60m'], 'eva02_l14_336': ['15m', '60m'], 'siglip2_so400m': ['60m']}
# Amount of data -> fragments.
SETS = {'3m': ['cc3m'], '15m': ['cc3m', 'cc12m'], '30m': ['cc3m', 'cc12m', 'yfcc15m'],
        '60m': ['cc3m', 'cc12m', 'yfcc15m', 'laion'], '60m_recap': ['cc3m', 'cc12m', 'yfcc15m', 'recap']}


def _head(file: str) -> list[str]:
    lines = (ROOT / file).read_text().splitlines()
    return [line.removeprefix('# ') for line in itertools.takewhile(lambda line: line.startswith('#'), lines)]


def _commands(file: str) -> list[tuple[str, list[str]]]:
    """Recipe and arguments of each command in a file's head, of which the first launches the file."""
    commands = [line for line in _head(file) if line.startswith(('python recipes/', 'composer '))]
    assert commands[0] == _head(file)[0] and file in shlex.split(commands[0])
    return [_arguments(command) for command in commands]


def _arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith('recipes/'))
    args = [str(ROOT / word) if word.startswith('yamls/') else word for word in words[at + 1:]]
    return Path(words[at]).stem, args


def _check(config: Any) -> None:
    if isinstance(config, PrepareConfig):
        check('source', *named(config.source, 'source'))
    if isinstance(config, TrainConfig):
        check_train_config(config)
        check_settings(json.loads(json.dumps(learned_settings(config))), config, 'a run')  # from a checkpoint
    if isinstance(config, Stage2Config):
        check_metrics(config, possible_metrics(config))
    for benchmark in [*getattr(config, 'eval_zeroshot', {}).values(), *getattr(config, 'zeroshot', {}).values()]:
        check('zeroshot', *named(benchmark.source, 'source'))
        assert benchmark.templates is None or read_templates(ROOT / benchmark.templates)
    for probe in getattr(config, 'linear_probe', {}).values():
        for source in (probe.train, probe.test):
            check('linear_probe', *named(source, 'train'))


def _written(config: Any) -> set[str]:
    if isinstance(config, ExtractConfig):
        return {f'{config.out}/{name}' for name in config.datasets}
    return {folder for name in ('out', 'save_folder', 'teacher_folder', 'adapter_folder')
            if (folder := getattr(config, name, None))}


def _named(config: Any) -> Iterator[str]:
    """Every path below `runs` or `data` in a configuration; of sources below `runs` alone: users have the others."""
    for key, value in leaves(dataclasses.asdict(config)):
        places = ('runs/',) if re.search('(^|[.])(source|linear_probe)[.]', key) else ('runs/', 'data/')
        unread = isinstance(config, Stage2Config) and '.embeddings.clip_text.' in key  # for train_inheritance
        if isinstance(value, str) and value.startswith(places) and not unread:
            yield value


def test_commands_load_and_every_folder_they_read_has_a_source() -> None:
    """A command in the head of some YAML file writes it, or the head of a file that reads it mentions it."""
    runs = []
    for file in FILES:
        for recipe, args in _commands(file):
            try:
                runs.append((file, args, config := load_config(SCHEMAS[recipe], args)))
                _check(config)
            except Exception as error:
                error.add_note(f'a command in the head of {file}')
                raise
    written = {folder for _, _, config in runs for folder in _written(config)}
    data = [str(path) for path in ROOT.glob('yamls/parts/data/*.yaml')]
    for teacher in ROOT.glob('yamls/parts/teacher/*.yaml'):
        written |= _written(load_config(ExtractConfig, [str(ROOT / 'yamls/extract/paper.yaml'), str(teacher), *data]))
    for file, args, config in runs:
        said = ' '.join(line for yaml_file in {file, *(arg for arg in args if arg.endswith('.yaml'))}
                        for line in _head(yaml_file) if not line.startswith(('python ', 'composer ')))
        for folder in _named(config):
            known = any(folder == other or folder.startswith(f'{other}/') for other in written)
            assert known or folder == getattr(config, 'out', None) or folder in said, (
                f'{file} reads {folder}, which no YAML file writes or explains')


def _stage2(*fragments: str) -> Stage2Config:
    files = ['stage2/paper', *(f'parts/{file}' if '/' in file else f'stage2/{file}' for file in fragments)]
    return load_config(Stage2Config, [str(ROOT / f'yamls/{file}.yaml') for file in files])


@pytest.fixture(scope='module')
def captions_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = ['0', '1', '2', '3', '4', 'short', 'long', 'raw', *(
        f'{length}{model}' for length in ('short', 'long') for model in ('IB', 'SV', 'LLA'))]
    out = tmp_path_factory.mktemp('data') / 'captions'
    write_dataset([Sample(f'{i}', {key: f'{key} {i}' for key in keys}) for i in range(32)], out)
    return out / 'train'


def test_the_text_pairs_of_the_paper_are_those_that_are_prepared() -> None:
    """Each under the official code's instructions, to the letter, and a semicolon."""
    prepared = load_config(PrepareConfig, [str(ROOT / 'yamls/prepare/echo.yaml'), 'out=data/echo']).source['files']
    streams = load_config(Stage1Config, _commands('yamls/stage1/paper.yaml')[0][1]).train_data.streams
    assert [stream.local for name, stream in streams.items() if name != 'captions'] == [
        f'data/echo/{Path(file).stem}' for file in prepared] and len(prepared) == 14
    prompts = [f'{name} {pair.instruction}' for name, stream in streams.items() for pair in stream.pairs or []]
    # Of the table E5_EMBEDDING_PROMPTS in the official llm_caption_contrastive/dataset/E5_cc3m.py.
    assert xxhash.xxh64('\n'.join(prompts)).hexdigest() == '47944227e9b5de52'
    assert [name for name, stream in streams.items() if len(stream.pairs or []) == 2] == ['allnli', 'quora_duplicates']
    alone = load_config(Stage1Config, _commands('yamls/stage1/captions_only.yaml')[0][1]).train_data.streams
    assert [*alone] == ['captions']


@pytest.mark.long
# Of those that name an LLM, one: the stand-in takes its place.
@pytest.mark.parametrize('file', [file for file in FILES if 'captions_only' not in file and (
    'yamls/stage1/' in file or file == 'yamls/quickstart/steps.yaml')])
def test_stage1_trains_a_stand_in(
    file: str, llm_folder: Path, captions_dataset: Path, text_pairs_dataset: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, args = next(command for command in _commands(file) if command[0] == 'train_stage1')
    stand_in = [f'text_encoder.pretrained={llm_folder}', 'text_encoder.gguf_file=null', 'text_encoder.dtype=float32',
                'global_train_batch_size=8', 'global_eval_batch_size=8', 'device_train_microbatch_size=8', 'device=cpu',
                'precision=fp32', 'max_duration=1ba', f'save_folder={tmp_path}/run', 'train_data.num_workers=0',
                'train_data.num_canonical_nodes=8', 'progress_bar=false', 'text_encoder.adapters=[]', 'compile=null']
    config = load_config(Stage1Config, args)
    assert config.text_encoder.bidirectional and config.lora.r == 16
    assert config.logit_scale == (20.0 if file.endswith(('quickstart/steps.yaml', 'simcse.yaml')) else 50.0)
    for name in config.train_data.streams:
        captions = name in ('captions', 'emoji', 'wikipedia')
        (tmp_path / name).symlink_to(captions_dataset if captions else text_pairs_dataset)
        stand_in += [f'train_data.streams.{name}.local={tmp_path}/{name}']
        if not captions and name not in ('wikitext', 'fever'):
            stand_in.append(f'train_data.streams.{name}=null')
    if 'grad_cache' in config.algorithms or config.objective == 'mntp':
        stand_in.append('device_train_microbatch_size=3')
    if config.eval_data is not None:
        stand_in += [f'eval_data.streams.val.local={captions_dataset}', 'eval_data.num_workers=0', 'eval_interval=1ba']
    run_recipe(monkeypatch, recipe, *args, *stand_in)
    assert (tmp_path / 'run/teacher/model.safetensors').is_file()
    assert (tmp_path / 'run/lora/adapter_model.safetensors').is_file()
    assert OmegaConf.load(tmp_path / 'run/config.yaml').lora == OmegaConf.structured(config.lora)


def test_the_steps_of_a_teacher_go_together() -> None:
    """Extraction and stage 2 read the teacher that stage 1 writes, if it does, and stage 2 the extraction's folder."""
    for teacher in TEACHER:
        part = str(ROOT / f'yamls/parts/teacher/{teacher}.yaml')
        data = str(ROOT / 'yamls/parts/data/cc3m.yaml')
        extract = load_config(ExtractConfig, [str(ROOT / 'yamls/extract/paper.yaml'), part, data, 'data=x'])
        stage2 = load_config(Stage2Config, [str(ROOT / 'yamls/stage2/paper.yaml'), part, data, 'data=x',
                                            str(ROOT / 'yamls/parts/tower/clip_b16.yaml')])
        assert extract.teacher == stage2.teacher, teacher
        assert stage2.train_data.streams['cc3m'].embeddings['teacher'].local == f'{extract.out}/cc3m'
        assert extract.out == f'x/embeddings/{teacher}'
        if isinstance(stage2.teacher, str):
            stage1 = load_config(Stage1Config, [str(ROOT / 'yamls/stage1/paper.yaml'), part])
            assert stage1.teacher_folder == stage2.teacher


def test_the_features_of_a_text_tower_are_where_inheritance_reads_them() -> None:
    for tower in TOWER:
        commands = dict(_commands(f'yamls/parts/tower/{tower}.yaml'))
        if 'train_inheritance' in commands:
            targets = load_config(ExtractConfig, commands['extract_embeddings'])
            inheritance = load_config(InheritanceConfig, commands['train_inheritance'])
            data = inheritance.train_data
            assert data.streams['cc3m'].embeddings[data.target].local == f'{targets.out}/cc3m'
            stage2 = _stage2(f'tower/{tower}', 'data/cc3m', 'teacher/llama3.1_8b', 'inheritance')
            assert stage2.initial_adapter == inheritance.adapter_folder


def test_the_steps_for_one_gpu_go_together() -> None:
    """One tower and teacher in all steps, and an adapter that the alignment can take over."""
    texts, targets, images, inheritance, align, _, evaluate = (
        load_config(SCHEMAS[recipe], args) for recipe, args in _commands('yamls/one_gpu/steps.yaml')[3:10])
    assert images.vision == dataclasses.replace(align.model.vision, architecture={}, freeze=False)
    assert images.vision.name == targets.teacher.name == evaluate.models['before'].pretrained
    assert texts.teacher == inheritance.teacher == align.teacher
    assert inheritance.adapter == align.model.adapter
    assert align.initial_adapter == inheritance.adapter_folder


@pytest.mark.parametrize('tower', TOWER)
def test_fragments_build_every_tower_and_row_of_the_paper(tower: str) -> None:
    assert sum(1 + len(data) for data in TABLE_1.values()) == 18
    scales = TABLE_1.get(tower, ['15m'])
    configs = {data: _stage2(f'tower/{tower}', *(f'data/{name}' for name in SETS[data]), 'teacher/llama3.1_8b')
               for data in scales}
    for data, config in configs.items():
        check_train_config(config)
        assert list(config.train_data.streams) == SETS[data]
    config = configs[scales[0]]
    size = config.model.vision.image_size
    with torch.device('meta'):
        model = LLM2CLIP(config.model, 4096, load_weights=False)
        outputs = model(torch.empty(2, 3, size, size), torch.empty(2, 4096))
    assert tower_preprocessing(config.model.vision).image_size == size == (336 if '336' in tower else 224)
    official = tower.endswith('official_code')
    assert outputs['image_features'].shape == outputs['text_features'].shape == (2, 1152 if official else 1280)
    kind = 'affine' if 'eva02' in tower else 'identity' if official else 'linear'
    assert projection_kind(model.visual_projection) == kind
    groups = parameter_groups(model, config.optimizer['lr'], 0.05, layer_decay=config.layer_decay)
    assert config.model.logit_scale == pytest.approx(1 / 0.07 if official else 100)
    decay = (1 if official else 0.85) ** (model.vision_encoder.num_layers - 1)
    assert min(group['lr'] for group in groups) == pytest.approx(1e-5 * decay)


@pytest.mark.parametrize('data', SETS)
def test_data_and_captions_go_together(data: str) -> None:
    assert sorted({name for names in SETS.values() for name in names}) == DATA
    datasets = [f'data/{name}' for name in SETS[data]]
    dense, short = ({f'{length}{model}' for model in ('IB', 'SV', 'LLA')} for length in ('long', 'short'))
    mixes = {'': {'raw': 3, **dict.fromkeys(dense, 1)}, 'official_code': {'shortSV': 1, 'longSV': 1},
             'six_captions': dict.fromkeys(dense | short, 1)}
    for captions, mix in mixes.items():
        fragments = [*datasets, 'teacher/llama3.1_8b']
        if captions:
            fragments.insert(len(datasets), captions)
        config = _stage2('tower/clip_b16', *fragments)
        for stream in SETS[data]:
            expected = {'raw': 0.5, 'long': 0.5} if stream == 'recap' else mix
            assert caption_mix(config.train_data.streams[stream], config.train_data) == expected


def test_every_classification_set_has_a_fragment() -> None:
    sources = {path.stem: [entry[key] for section in yaml.safe_load(path.read_text()).values()
                           for entry in section.values() for key in ('source', 'train', 'test') if key in entry]
               for path in ROOT.glob('yamls/eval/sets/*.yaml') if '\nprepare_data:' not in path.read_text()}
    assert {source['name'] for of_file in sources.values() for source in of_file} == {*CLASSIFICATION_SETS}


@pytest.mark.parametrize(('seconds', 'requeued'), [(0, False), (601, True)])
def test_a_slurm_job_that_fails_at_once_is_not_queued_again(seconds: int, requeued: bool, tmp_path: Path) -> None:
    for name, script in {'scontrol': 'echo $1', 'srun': 'exit 1'}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{script}\n')
        (tmp_path / name).chmod(0o755)
    script = f'SECONDS={seconds}\n' + (ROOT / 'yamls/cluster/slurm.sbatch').read_text()
    job = {'SLURM_JOB_NODELIST': 'a', 'SLURM_CPUS_PER_TASK': '1', 'SLURM_JOB_ID': '1'}
    found = subprocess.run(['bash', '-c', script], env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', **job},
                           capture_output=True, text=True)
    assert found.returncode == 1 and ('requeue' in found.stdout) is requeued


@pytest.mark.parametrize('file', LAUNCHERS)
def test_cluster_files_launch_what_loads(file: str) -> None:
    script = (ROOT / file).read_text()
    commands = [line for line in _head(file) if line.startswith('sbatch')]
    if file.endswith('.yaml'):
        job = yaml.safe_load(script)
        script, commands = job['run'], [job['envs']['RUN']]
    assert subprocess.run(['bash', '-n'], input=script, text=True).returncode == 0
    config, *_ = (load_config(SCHEMAS[recipe], args) for recipe, args in map(_arguments, commands))
    _check(config)
    assert config.checkpoint_folder.startswith('s3://')
