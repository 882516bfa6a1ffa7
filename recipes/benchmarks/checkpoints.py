# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How long a sharded checkpoint holds up training on two ranks with a slow disk: written in the background, and at once
as Composer's own saver does."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import composer.callbacks
import torch
from bench_result import write_result
from composer import Callback, State, Trainer
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist, get_device
from composer.utils.parallelism import FSDP2Config

from llm2clip.training.callbacks.checkpoint_saver import CheckpointSaver, host_copy

# 34 M parameters: 400 MB with the state of AdamW.  Bytes per second and rank.
WIDTH, LAYERS, DISK = 2048, 8, 100e6
STEPS, SAVE, ROUNDS = 16, 10, 2
RANKS = 2


class _Model(ComposerModel):

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def forward(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layers(batch[0])

    def loss(self, outputs: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
        return outputs.square().mean()


class _Clock(Callback):
    """When each step begins."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.starts.append(time.perf_counter())


def slow_fsync(file: int) -> None:
    """As long as the disk would need."""
    time.sleep(os.fstat(file).st_size / DISK)


def hold_up(folder: str, background: bool) -> dict[str, float]:
    """Seconds of a step without a checkpoint, how much longer one with a checkpoint takes, those after it while it is
    written, and a copy of the state to host memory."""
    os.fsync = slow_fsync
    dist.initialize_dist(get_device('cpu'))
    model, clock = _Model(), _Clock()
    savers = (CheckpointSaver, composer.callbacks.CheckpointSaver)
    saver: Any = savers[not background](folder, save_interval=f'{SAVE}ba', overwrite=True)
    samples = torch.utils.data.TensorDataset(torch.randn(STEPS * 8 * RANKS, WIDTH))
    loader = torch.utils.data.DataLoader(samples, 8, sampler=dist.get_sampler(samples))
    trainer = Trainer(
        model=model, train_dataloader=loader, optimizers=torch.optim.AdamW(model.parameters()),
        max_duration=f'{STEPS}ba', callbacks=[clock, saver],
        device='cpu', precision='fp32', progress_bar=False, parallelism_config={'fsdp': FSDP2Config()})
    trainer.fit()
    steps = [after - before for before, after in zip(clock.starts, clock.starts[1:])]
    with_save, writing = steps[SAVE - 1], steps[SAVE:SAVE + 4]
    plain = statistics.median(steps[2:SAVE - 1])
    state = trainer.state.state_dict()
    begun = time.perf_counter()
    host_copy(state)
    return {'step': plain, 'hold_up': with_save - plain, 'next_steps': statistics.median(writing),
            'copy': time.perf_counter() - begun}


def measure(kind: str) -> dict[str, float]:
    """`hold_up` in processes of its own."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(('127.0.0.1', 0))
        env = {**os.environ, 'WORLD_SIZE': str(RANKS), 'LOCAL_WORLD_SIZE': str(RANKS), 'NODE_RANK': '0',
               'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'OMP_NUM_THREADS': '1'}
        free.close()
        ranks = [subprocess.Popen([sys.executable, __file__, folder, kind], stdout=subprocess.PIPE, text=True,
                                  env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(RANKS)]
        outputs = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f'a rank failed: {outputs}')
        return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {'background': [], 'at once': []}
    for _ in range(ROUNDS):
        for kind, seconds in found.items():
            seconds.append(measure(kind))
    medians = {f'{kind}, {name}': statistics.median(one[name] for one in seconds)
               for kind, seconds in found.items() for name in seconds[0]}
    ratio = medians['background, hold_up'] / medians['at once, hold_up']
    write_result('checkpoints', 'seconds that a step with a 400 MB sharded checkpoint takes longer (2 ranks, 100 MB/s)',
                 "Composer's own saver", ratio, 0.3, ratio <= 0.3, medians)


if __name__ == '__main__':
    if len(sys.argv) > 1:
        folder = str(Path(sys.argv[1], 'checkpoints'))
        print(json.dumps(hold_up(folder, sys.argv[2] == 'background')))
    else:
        main()
