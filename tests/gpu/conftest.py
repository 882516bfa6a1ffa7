# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What only a GPU can show, by small real parts: `make test-gpu`.

Without a GPU these tests fail.  With ``DEVICE=cpu`` they run on the CPU, in 16 bits too, which tries the tests.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composer.trainer.trainer
import launched
import pytest
import torch
import torch.distributed
from composer import Callback
from launched import DEVICE, Train, stage1_arguments, stage2_arguments
from recipes_in_process import run_recipe

import llm2clip.training.trainer
from llm2clip.training.algorithms import grad_cache


@pytest.fixture(autouse=True, scope='session')
def _there_is_a_gpu() -> Iterator[None]:
    if DEVICE == 'gpu':
        if not torch.cuda.is_available():
            pytest.fail('there is no GPU; with DEVICE=cpu these tests try themselves on the CPU', pytrace=False)
        yield
    else:
        with _sixteen_bits_on_a_cpu():
            yield


@contextmanager
def _sixteen_bits_on_a_cpu() -> Iterator[None]:
    """Let Composer's Trainer compute in 16 bits on a CPU, which it and the check of a configuration refuse."""
    types = {'amp_bf16': torch.bfloat16, 'amp_fp16': torch.float16}

    def context(precision: Any, *_: Any, **__: Any) -> Any:
        return torch.autocast('cpu', types.get(precision.value), enabled=precision.value in types)

    check = llm2clip.training.trainer.check_train_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm2clip.training.trainer, 'check_train_config',
                      lambda config: check(dataclasses.replace(config, precision='fp32')))
        patch.setattr(composer.trainer.trainer, '_validate_precision', lambda *_: None)
        for module in (composer.trainer.trainer, grad_cache):
            patch.setattr(module, 'get_precision_context', context)
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device('cuda' if DEVICE == 'gpu' else 'cpu')


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:

    def run(name: str, *args: str) -> None:
        run_recipe(monkeypatch, name, *args)
        if torch.distributed.is_initialized():  # for one kind of device
            torch.distributed.destroy_process_group()

    return run


@pytest.fixture
def arguments(image_dataset: Path, llm_folder: Path, embeddings: Path) -> dict[int, list[str]]:
    """Stage -> arguments of a small training.

    It is one with SGD, so that weights differ as soon as gradients do, and without dropout; 16 bits suffice for its
    temperature.
    """
    ours = ['train_data.num_workers=0', 'optimizer={name: sgd, lr: 0.01}', 'max_duration=8ba', 'save_interval=100ba']
    stage1, stage2 = stage1_arguments(image_dataset, llm_folder), stage2_arguments(image_dataset, embeddings)
    return {1: [*stage1, *ours, 'logit_scale=10'], 2: [*stage2, *ours, 'eval_interval=100ba']}


@pytest.fixture
def train(recipe: Callable[..., None], arguments: dict[int, list[str]], tmp_path: Path) -> Train:

    def run(stage: int, name: str, *args: str) -> Path:
        recipe(f'train_stage{stage}', *arguments[stage], f'device={DEVICE}', *args, f'save_folder={tmp_path}/{name}')
        return tmp_path / name

    return run


@pytest.fixture
def train_on_two(arguments: dict[int, list[str]], tmp_path: Path) -> Train:

    def run(stage: int, name: str, *args: str) -> Path:
        launched.run(f'train_stage{stage}', tmp_path / name, [*arguments[stage], f'device={DEVICE}', *args], 2)
        return tmp_path / name

    return run


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callback], None]:
    """Add a callback to all trainings."""
    fit = llm2clip.training.trainer.fit

    def watch(callback: Callback) -> None:
        monkeypatch.setattr(llm2clip.training.trainer, 'fit',
                            lambda trainer, config: (trainer.state.callbacks.append(callback), fit(trainer, config)))

    return watch
