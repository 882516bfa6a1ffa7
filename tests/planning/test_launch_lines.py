# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The commands in the heads of the YAML files, planned on eight GPUs, without data, network or teacher."""

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm

from llm2clip.config import ExtractConfig, ExtractImagesConfig, InheritanceConfig, Stage1Config, Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.models import towers
from llm2clip.planning import dry_run
from llm2clip.planning.dry_run import fake_ranks
from llm2clip.planning.plan import Plan
from llm2clip.planning.planners import make_plan
from llm2clip.planning.roofline import GPUS

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, Any] = {'train_stage1': Stage1Config, 'train_stage2': Stage2Config,
                           'train_inheritance': InheritanceConfig, 'extract_embeddings': ExtractConfig,
                           'extract_image_embeddings': ExtractImagesConfig}

# Recipes and files that change no shape of a step: neither data nor captions nor the weights of the LLM do.
SAME_SHAPES = re.compile(r'train_(stage2|inheritance) yamls/parts/teacher|\w+ yamls/(parts/data|cluster|'
                         'stage1/captions|stage2/(six_captions|watch_zeroshot|continue_official))')
# With one shallow LLM for all, these decide neither optimizer nor sharding; tests/test_yamls.py builds whole towers.
SAME_PARTS = re.compile(rf'{SAME_SHAPES.pattern}|\w+ yamls/(extract|parts)')
EMBEDDERS = {str(path.relative_to(ROOT)) for path in ROOT.glob('yamls/**/*.yaml')
             if 'type: sentence_transformers' in path.read_text()}


def _reads_the_hub(recipe: str, line: str) -> bool:
    """Whether a line extracts by an encoder other than an LLM and timm's towers, or trains CLIP's text tower."""
    if recipe == 'extract_embeddings':
        return 'yamls/parts/tower' in line or not EMBEDDERS.isdisjoint(line.split())
    return 'clip_directly' in line or recipe == 'extract_image_embeddings' and 'one_gpu' in line


def _lines(same: 're.Pattern[str]') -> list[tuple[str, ...]]:
    """Recipe and arguments, one of those that differ in nothing but files that match `same`."""
    lines: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path in sorted(ROOT.glob('yamls/**/*.yaml')):
        for line in itertools.takewhile(lambda line: line.startswith('#'), path.read_text().splitlines()):
            words = shlex.split(line[2:]) if line.startswith(('# composer ', '# python recipes/')) else []
            at = next((i for i, word in enumerate(words) if word.startswith('recipes/')), 0)
            recipe = Path(words[at]).stem if words else ''
            small = any(name in line for name in ('yamls/custom_data/', 'uickstart', 'yamls/flickr8k/'))
            if recipe in CONFIGS and not _reads_the_hub(recipe, line) and (not small or 'gpu' in line):
                args = [arg for arg in words[at + 1:] if not arg.startswith((
                    'text_encoder.pretrained=', 'text_encoder.chat_template='))]
                lines.setdefault((recipe, *(arg for arg in args if not same.match(f'{recipe} {arg}'))), (recipe, *args))
    return list(lines.values())


def _plan(recipe: str, args: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with fake_ranks(8):
        return make_plan(load_config(CONFIGS[recipe], [*args, 'plan_samples=15e6']))


@pytest.fixture(scope='module')
def shallow_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.1 8B with two layers."""
    folder = tmp_path_factory.mktemp('llm')
    config = json.loads((ROOT / 'yamls/llms/llama3.1_8b/config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 2}))
    return folder


@pytest.fixture
def shallow_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers of two blocks, of timm and of transformers."""
    create, architecture = timm.create_model, towers.load_architecture
    monkeypatch.setattr(timm, 'create_model', lambda name, **options: create(name, depth=2, **options))
    monkeypatch.setattr(towers, 'load_architecture', lambda name, given: architecture(
        name, {**given, 'num_hidden_layers': 2} if given else given))


@pytest.mark.usefixtures('shallow_towers')
@pytest.mark.parametrize('line', _lines(SAME_PARTS), ids=lambda line: ' '.join(Path(arg).stem for arg in line))
def test_parts_go_together(line: tuple[str, ...], shallow_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, '_run_step', lambda *args: None)
    monkeypatch.setattr(dry_run.EncoderPass, 'run', lambda self: None)
    llm = [] if line[0] == 'extract_image_embeddings' else [f'plan_llm={shallow_llm}']
    plan = _plan(line[0], [*line[1:], *llm], monkeypatch)
    # Of another run, which comes before.
    problems = [problem for problem in plan.errors
                if not problem.startswith(('initial_weights', 'teacher: trainable_text.lora needs one'))]
    assert plan.cost and plan.cost.peak and not problems


@pytest.mark.slow
@pytest.mark.parametrize('line', _lines(SAME_SHAPES), ids=lambda line: ' '.join(Path(arg).stem for arg in line))
def test_every_line_fits_an_h100(line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(line[0], line[1:], monkeypatch)
    assert plan.cost and GPUS['H100'].fits(plan.cost.peak), str(plan)
