# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A stage-2 step as the recipe runs it against a bare PyTorch loop, ViT-B/16.

Ours: Composer's Trainer, the joined stream, the logging of the paper's YAML.  Bare: the same model, loss, optimizer and
clipping on a batch that is in memory already.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from bench_result import write_result
from composer import Callback, State
from composer.loggers import Logger
from loaders import DIM, write_data

from llm2clip.config import Stage2Config
from llm2clip.config.files import load_config
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.training import stage2
from llm2clip.training.trainer import build_optimizer

BATCH, STEPS, ROUNDS = 8, 4, 5
Batch = dict[str, Any]
YAML = str(Path(__file__).parents[2] / 'yamls/stage2/paper.yaml')


class InTurns(Callback):
    """Seconds of our steps, logging and the wait for data included; after every few, the same number of bare ones.

    One `fit` of Composer throughout, so that neither workers nor checkpoints come between.
    """

    def __init__(self, bare: Callable[[Batch], list[float]]) -> None:
        self.run_bare = bare
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._end: Optional[float] = None

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._end is not None:
            self.ours.append(time.perf_counter() - self._end)
        if state.timestamp.batch.value % (STEPS + 1) == 0:
            # The step after this one does not count: the bare ones have taken the caches.
            self.bare += self.run_bare(state.batch)[1:]
            self._end = None
        else:
            self._end = time.perf_counter()


def make_model(config: Stage2Config) -> tuple[ComposerLLM2CLIP, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = stage2.make_model(config, DIM)
    return model, build_optimizer(config, model)


def bare_steps(model: ComposerLLM2CLIP, optimizer: torch.optim.Optimizer, batch: Batch) -> list[float]:
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model.loss(model(batch), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        stream = f'{{local: {folder}/images/train, embeddings: {{bench: {{local: {folder}/sidecar}}}}}}'
        config = load_config(Stage2Config, [
            YAML, 'model.vision.name=vit_base_patch16_224', 'model.vision.pretrained=false',
            'model.vision.gradient_checkpointing=false',
            'device=cpu', 'precision=fp32', f'global_train_batch_size={BATCH}',
            f'max_duration={(STEPS + 1) * ROUNDS}ba',
            f'save_folder={folder}/run', 'save_interval=1000ba', 'run_name=bench', 'train_data.num_workers=1',
            f'train_data.streams.bench={stream}', 'train_data.caption_mix={short: 0.5, long: 0.5}',
            'progress_bar=false'])
        trainer = stage2.make_trainer(config)
        in_turns = InTurns(partial(bare_steps, *make_model(config)))
        trainer.state.callbacks.append(in_turns)
        trainer.fit()
        trainer.close()
    medians = {'ours': statistics.median(in_turns.ours), 'bare': statistics.median(in_turns.bare)}
    ratio = medians['ours'] / medians['bare']
    write_result('stage2_step', f'seconds per step, Composer with joined stream and logging, batch {BATCH}',
                 'a bare PyTorch loop', ratio, 1.05, ratio <= 1.05, medians)


if __name__ == '__main__':
    main()
