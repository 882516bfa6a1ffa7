# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compiled trainings learn what others learn, and stop compiling after the first steps and the first evaluation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import SGD, losses
from recipes_in_process import run_recipe
from refusals import refused_at
from torch._dynamo.utils import counters

from llm2clip.config import Stage1Config, Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.config_checks import check_compiler, check_train_config

CACHED = ['algorithms.grad_cache={}', 'device_train_microbatch_size=3']
TOWERS = {
    'plain': [],
    'cached': CACHED,
    'self_distillation': ['self_distillation.enabled=true'],
    'patch_dropout': ['algorithms.patch_dropout={}'],
    'lora': ['model.vision.lora={r: 4}', 'model.vision.freeze_blocks=0'],
}
LLMS = {'mntp': ['objective=mntp', 'train_data.texts={short: 1.0}'], 'plain': [], 'cached': CACHED}
Check = Callable[..., None]


def slow(*values: str) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    def check(recipe: str, args: list[str], **options: object) -> None:
        """Six steps, eager and compiled; evaluations after two, four and six."""
        args = [*args, *SGD, 'train_data.num_workers=0']
        compiled = [f'compile={options}', 'callbacks={"user_callbacks:CountGraphs": {}}']
        for name, extra in {'eager': [], 'compiled': compiled}.items():
            torch.compiler.reset()
            counters.clear()
            run_recipe(monkeypatch, recipe, *args, *extra, f'save_folder={tmp_path}/{name}')
        assert losses(tmp_path / 'compiled') == pytest.approx(losses(tmp_path / 'eager'), rel=1e-5)
        graphs = [*read_metrics(tmp_path / 'compiled/metrics.jsonl')['graphs'].values()]
        assert len(graphs) == 6 and graphs[0] > 0 and graphs[-1] == graphs[2], graphs

    return check


@pytest.fixture
def tower(stage2_args: list[str]) -> list[str]:
    return [*stage2_args, 'model.vision.name=test_vit', 'eval_interval=2ba', 'eval_data.num_workers=0']


@pytest.mark.parametrize('way', ['cached', 'self_distillation', *slow('plain', 'patch_dropout', 'lora')])
def test_towers(way: str, tower: list[str], check: Check) -> None:
    check('train_stage2', [*tower, *TOWERS[way]], backend='aot_eager', fullgraph=True)


@pytest.mark.parametrize('way', ['mntp', *slow('plain', 'cached')])
def test_llms(way: str, stage1_args: list[str], check: Check) -> None:
    check('train_stage1', [*stage1_args, *LLMS[way]], backend='aot_eager')


@pytest.mark.slow
def test_an_llm_in_stage_2(tower: list[str], teacher_folder: Path, check: Check) -> None:
    check('train_stage2', [*tower, f'teacher={teacher_folder}', 'trainable_text.lora={r: 4, lora_dropout: 0.0}'],
          backend='aot_eager')


@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 2])
def test_the_default_backend(stage: int, stage1_args: list[str], tower: list[str], check: Check) -> None:
    check(f'train_stage{stage}', stage1_args if stage == 1 else tower)


@pytest.mark.parametrize('options', ['backend: none', 'mode: fast', 'options: {fast: 1}', 'model: null'])
def test_an_option_that_torch_does_not_know(options: str, stage2_args: list[str], tmp_path: Path) -> None:
    config = load_config(Stage2Config, [*stage2_args, f'compile={{{options}}}', f'save_folder={tmp_path}'])
    with refused_at('compile'):
        check_train_config(config)


def test_without_a_compiler(stage1_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CC', raising=False)
    args = [*stage1_args, f'save_folder={tmp_path}/run']
    check_compiler(load_config(Stage1Config, [*args, 'compile={backend: aot_eager}']))
    with pytest.raises(ConfigError, match=r'^compile: .*C compiler'):
        check_compiler(load_config(Stage1Config, [*args, 'compile={}']))
