# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every shipped YAML: the command in its first line loads, its parts exist, and those of stage 1 train."""

import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from recipes_in_process import run_recipe

from llm2clip.builders import SOURCES, check, check_train_config
from llm2clip.config import (
    EvaluateConfig,
    ExportConfig,
    ExportTeacherConfig,
    ExtractConfig,
    PrepareConfig,
    ReportConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
)
from llm2clip.config_files import load_config

ROOT = Path(__file__).parents[1]
SCHEMAS = {'prepare_data': PrepareConfig, 'train_stage1': Stage1Config, 'extract_embeddings': ExtractConfig,
           'train_stage2': Stage2Config, 'evaluate': EvaluateConfig, 'export_hf': ExportConfig,
           'export_sentence_transformers': ExportTeacherConfig, 'report': ReportConfig}
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('yamls/**/*.yaml'))


def _command(file: str) -> tuple[str, list[str]]:
    """Recipe and arguments of the launch command in a file's first line."""
    words = shlex.split((ROOT / file).read_text().splitlines()[0].removeprefix('#'))
    at = next(i for i, word in enumerate(words) if word.startswith('recipes/'))
    assert file in words[at + 1:] and (words[0] in ('python', 'composer'))
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
