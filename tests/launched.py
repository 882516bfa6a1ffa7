# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Recipes as a user launches them, with a rank or two."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import load_checkpoint_model

ROOT = Path(__file__).parents[1]
COMPOSER = Path(sys.executable).with_name('composer')

COMMON = ['global_train_batch_size=8', 'max_duration=6ba', 'progress_bar=false', 'save_interval=2ba', 'precision=fp32',
          'train_data.num_workers=1', 'train_data.num_canonical_nodes=4', 'run_name=test', 'device=cpu',
          'scheduler.name=constant']
# SGD with a clipped gradient: weights differ as soon as a gradient or its norm does.
SGD = ['optimizer.name=sgd', 'algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.5}']


# A sharded LLM, its activations recomputed, a microbatch of 3 of the 4 samples that a rank has.
SHARDED = ['fsdp={state_dict_type: sharded, activation_checkpointing: true}', 'algorithms.grad_cache={}',
           'device_train_microbatch_size=3']


def start(recipe: str, folder: Path, args: list[str], ranks: int = 1, **env: str) -> 'subprocess.Popen[str]':
    log = open(folder.with_suffix('.log'), 'a')  # noqa: SIM115
    command = [str(COMPOSER), '-n', str(ranks), f'recipes/{recipe}.py', *args, f'save_folder={folder}']
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONFAULTHANDLER': '1', **env})


def run(recipe: str, folder: Path, args: list[str], ranks: int = 1, ok: bool = True, **env: str) -> str:
    process = start(recipe, folder, args, ranks, **env)
    try:
        code = process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # each process writes where it was
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    output = folder.with_suffix('.log').read_text()
    assert (code == 0) is ok and code != -signal.SIGKILL, output[-20_000:]
    return output


def losses(folder: Path) -> dict[int, float]:
    return read_metrics(folder / 'metrics.jsonl').get('loss/train/total', {})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint_model(folder)
