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

from llm2clip.config import ExtractConfig, InheritanceConfig, Stage1Config, Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.planning import dry_run
from llm2clip.planning.dry_run import fake_ranks
from llm2clip.planning.plan import GPUS, Plan
from llm2clip.planning.planners import make_plan

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, Any] = {'train_stage1': Stage1Config, 'train_stage2': Stage2Config,
                           'train_inheritance': InheritanceConfig, 'extract_embeddings': ExtractConfig}

# With one shallow LLM for all, these decide neither optimizer nor sharding; tests/test_yamls.py builds all towers.
SAME = re.compile(
    'yamls/(extract|cluster|inheritance/target|stage2/(vision|teacher|data)|stage1/(llama|qwen|smollm|r1))')


def _lines() -> list[tuple[str, ...]]:
    """Recipe and arguments, one of those whose steps have the same shapes: neither data nor captions nor the LLM's
    weights change the plan of a step."""
    lines: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path in sorted(ROOT.glob('yamls/**/*.yaml')):
        text = path.read_text()
        if 'clip_text' in text or 'extract' in path.parts and 'sentence_transformers' in text:
            continue  # of an LLM alone, the extraction is planned
        for line in itertools.takewhile(lambda line: line.startswith('#'), text.splitlines()):
            words = shlex.split(line[2:]) if line.startswith(('# composer ', '# python recipes/')) else []
            recipe = next((word for word in words if word.startswith('recipes/')), '')
            small = any(name in line for name in ('yamls/custom_data/', 'uickstart', 'yamls/flickr8k/'))
            if Path(recipe).stem in CONFIGS and (not small or 'gpu' in line):
                data = 'yamls/stage2/data/' if 'sail' not in line else 'x'  # which names both datasets of its file
                args = ['yamls/stage2/data/cc3m.yaml' if arg.startswith(data) else arg
                        for arg in words[words.index(recipe) + 1:] if not arg.startswith((
                            'yamls/stage2/captions/', 'yamls/stage1/captions_only', 'text_encoder.pretrained=',
                            'text_encoder.chat_template='))]
                shapes = [arg for arg in args if not arg.startswith((
                    'yamls/stage2/teacher/', 'yamls/stage2/watch_zeroshot', 'yamls/stage2/continue_official',
                    'yamls/cluster/'))]
                lines.setdefault((Path(recipe).stem, *dict.fromkeys(shapes)), (Path(recipe).stem, *dict.fromkeys(args)))
    return list(lines.values())


def _one_of_each() -> list[tuple[str, ...]]:
    lines: dict[tuple[str, ...], tuple[str, ...]] = {}
    for line in _lines():
        lines.setdefault(tuple(arg for arg in line if not SAME.match(arg)), line)
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


@pytest.mark.parametrize('line', _one_of_each(), ids=lambda line: ' '.join(Path(arg).stem for arg in line))
def test_model_optimizer_and_sharding_go_together(
    line: tuple[str, ...], shallow_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, '_run_step', lambda *args: None)
    monkeypatch.setattr(dry_run.EncoderPass, 'run', lambda self: None)
    plan = _plan(line[0], [*line[1:], f'plan_llm={shallow_llm}'], monkeypatch)
    # Of another run, which comes before.
    problems = [problem for problem in plan.errors
                if not problem.startswith(('initial_weights', 'teacher: trainable_text.lora needs one'))]
    assert plan.cost and plan.cost.peak and not problems


@pytest.mark.slow
@pytest.mark.parametrize('line', _lines(), ids=lambda line: ' '.join(Path(arg).stem for arg in line))
def test_every_line_fits_an_h100(line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(line[0], line[1:], monkeypatch)
    assert plan.cost and GPUS['H100'].fits(plan.cost.peak), str(plan)
