# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every shipped YAML: the command in its first line loads, its parts exist, and those of stage 1 train."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from recipes_in_process import run_recipe

from llm2clip.builders import CLASSIFICATION_SETS, RETRIEVAL_SETS, SOURCES, check, check_train_config
from llm2clip.config import (
    EvaluateConfig,
    ExportConfig,
    ExportTeacherConfig,
    ExtractConfig,
    ImportConfig,
    PrepareConfig,
    ReportConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
)
from llm2clip.config_files import load_config
from llm2clip.evaluation.classification import read_templates
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.towers import tower_preprocessing
from llm2clip.optim import parameter_groups

ROOT = Path(__file__).parents[1]
SCHEMAS = {'prepare_data': PrepareConfig, 'train_stage1': Stage1Config, 'extract_embeddings': ExtractConfig,
           'train_stage2': Stage2Config, 'evaluate': EvaluateConfig, 'export_hf': ExportConfig,
           'export_sentence_transformers': ExportTeacherConfig, 'report': ReportConfig,
           'import_official': ImportConfig}
LAUNCHERS = ['yamls/cluster/mcli.yaml', 'yamls/cluster/skypilot.yaml', 'yamls/cluster/slurm.sbatch']
FILES = sorted({str(path.relative_to(ROOT)) for path in ROOT.glob('yamls/**/*.yaml')} - set(LAUNCHERS))
VISION, DATA, TEACHER = (sorted(path.stem for path in ROOT.glob(f'yamls/stage2/{kind}/*.yaml'))
                         for kind in ('vision', 'data', 'teacher'))


def _command(file: str) -> tuple[str, list[str]]:
    """Recipe and arguments of the launch command in a file's first line."""
    line = (ROOT / file).read_text().splitlines()[0].removeprefix('#')
    words = shlex.split(line)
    assert file in words and (words[0] in ('python', 'composer'))
    return _arguments(line)


def _arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith('recipes/'))
    args = [str(ROOT / word) if word.startswith('yamls/') else word for word in words[at + 1:]]
    return Path(words[at]).stem, args


@pytest.mark.parametrize('file', FILES)
def test_the_launch_command_loads(file: str) -> None:
    recipe, args = _command(file)
    config = load_config(SCHEMAS[recipe], args)
    if isinstance(config, TrainConfig):
        check_train_config(config)
    if isinstance(config, PrepareConfig):
        check(SOURCES, config.source.pop('name'), config.source, 'source')
    if isinstance(config, EvaluateConfig):
        for benchmark in config.retrieval.values():
            check(RETRIEVAL_SETS, benchmark.source.pop('name'), benchmark.source, 'source')
        for benchmark in config.zeroshot.values():
            check(CLASSIFICATION_SETS, benchmark.source.pop('name'), benchmark.source, 'source')
            assert read_templates(ROOT / benchmark.templates, 'templates')


@pytest.mark.parametrize('file', [file for file in FILES if 'yamls/stage1/' in file])
def test_stage1_trains_a_stand_in(
    file: str, llm_folder: Path, image_dataset: Path, text_pairs_dataset: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, args = _command(file)
    stand_in = [f'text_encoder.pretrained={llm_folder}', 'text_encoder.gguf_file=null', 'text_encoder.dtype=float32',
                'global_train_batch_size=8', 'global_eval_batch_size=8', 'device_train_microbatch_size=8', 'device=cpu',
                'precision=fp32', 'max_duration=1ba', f'save_folder={tmp_path}/run', 'train_data.num_workers=0',
                'train_data.num_canonical_nodes=8', 'progress_bar=false']
    config = load_config(Stage1Config, args)
    assert config.text_encoder.bidirectional and config.lora.r == 16 and config.loss_scale == 50.0
    for name in config.train_data.streams:
        folder = text_pairs_dataset if name in ('text_pairs', 'wikitext') else image_dataset
        (tmp_path / name).symlink_to(folder)
        stand_in += [f'train_data.streams.{name}.local={tmp_path}/{name}']
    if 'grad_cache' in config.algorithms or config.objective == 'mntp':
        stand_in.append('device_train_microbatch_size=3')
    if config.eval_data is not None:
        stand_in += [f'eval_data.streams.heldout.local={image_dataset}', 'eval_data.num_workers=0', 'eval_interval=1ba']
    if any('0' in pair.query for pair in config.train_data.pairs):
        stand_in.append('train_data.pairs=[{query: [short], positive: [long]}]')
    run_recipe(monkeypatch, recipe, *args, *stand_in)
    assert (tmp_path / 'run/teacher/model.safetensors').is_file()
    assert (tmp_path / 'run/adapter/adapter_model.safetensors').is_file()
    assert OmegaConf.load(tmp_path / 'run/config.yaml').lora == OmegaConf.structured(config.lora)


@pytest.mark.parametrize('vision', VISION)
def test_the_grid_of_stage2_loads_and_builds(vision: str) -> None:
    assert len(VISION) == 6 and len(DATA) == 4 and len(TEACHER) == 5
    for data in DATA:
        for teacher in TEACHER:
            files = ['paper', f'vision/{vision}', f'data/{data}', f'teacher/{teacher}']
            config = load_config(Stage2Config, [str(ROOT / f'yamls/stage2/{file}.yaml') for file in files])
            check_train_config(config)
            name, = config.train_data.teachers
            assert all(name in stream.embeddings for stream in config.train_data.streams.values())
    with torch.device('meta'):
        model = LLM2CLIP(config.model, 4096, load_weights=False)
    size = config.model.vision.image_size
    assert tower_preprocessing(config.model.vision).image_size == size
    outputs = model(torch.empty(2, 3, size, size, device='meta'), torch.empty(2, 4096, device='meta'))
    assert outputs['image_features'].shape == (2, 1280)
    millions = sum(p.numel() for p in model.vision_encoder.parameters()) / 1e6
    expected = {'clip_b16': 86, 'clip_l14': 303, 'clip_l14_336': 304, 'eva02_l14': 303, 'eva02_l14_336': 304,
                'siglip2_so400m': 428}
    assert millions == pytest.approx(expected[vision], abs=1)
    groups = parameter_groups(model, config.optimizer['lr'], 0.05, layer_decay=config.layer_decay)
    assert min(group['lr'] for group in groups) == pytest.approx(1e-5 * 0.85 ** (model.vision_encoder.num_layers - 1))


@pytest.mark.parametrize('file', LAUNCHERS)
def test_cluster_files_launch_what_loads(file: str) -> None:
    text = (ROOT / file).read_text()
    if file.endswith('.yaml'):
        text = next(value for key, value in yaml.safe_load(text).items() if key in ('run', 'command'))
    else:
        assert subprocess.run(['bash', '-n', str(ROOT / file)]).returncode == 0
        text = text[:text.index("yaml'") + 4].replace("bash -c '", '')
    command = next(line for line in text.replace('\\\n', ' ').splitlines() if 'recipes/' in line)
    recipe, args = _arguments(command)
    config = load_config(SCHEMAS[recipe], args)
    assert isinstance(config, Stage2Config) and config.checkpoint_folder.startswith('s3://') and config.autoresume
    check_train_config(config)
