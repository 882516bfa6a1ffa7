# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Measure one case of `cases.py` and write its result:
python -m recipes.benchmarks.gpu.one_case NAME gpu|cpu RESULT.json

A training is planned and built by the functions of its recipe, and runs in Composer's loop without
checkpoints.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Callback, State
from composer.callbacks import CheckpointSaver
from composer.loggers import Logger

from llm2clip.config import ExtractConfig, Stage1Config, Stage2Config, TrainConfig
from llm2clip.config.loading import load_config
from llm2clip.device import get_device, set_up_process
from llm2clip.errors import ConfigError
from llm2clip.io.files import write_json
from llm2clip.io.remotes import OutputFolder
from llm2clip.planning.dry_run import fake_ranks
from llm2clip.planning.planners import make_plan
from llm2clip.planning.roofline import GPUS
from llm2clip.ranks import initialize_gloo
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings
from llm2clip.teacher.llm import load_caption_tokenizer
from llm2clip.teacher.sources import teacher_source
from llm2clip.training import stage1, stage2
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.trainer import Parts, build_trainer, fit, initialize
from recipes.benchmarks.gpu.cases import CASES, OUT, SCHEMAS, SIZES, arguments, window
from recipes.benchmarks.measuring import describe, hardware
from recipes.benchmarks.random_data import write_captions, write_images, write_llm, write_vectors

Result = dict[str, Any]
GIB = 2**30
MOST_WORKERS = 16
# Names of boards whose peak is that of `GPUS`; the PCIe and NVL boards of the H100 and H200 are slower.
BOARDS = {'NVIDIA A100-SXM4-40GB': 'A100', 'NVIDIA A100-SXM4-80GB': 'A100', 'NVIDIA A100-PCIE-40GB': 'A100',
          'NVIDIA A100 80GB PCIe': 'A100', 'NVIDIA H100 80GB HBM3': 'H100', 'NVIDIA H200': 'H200',
          'NVIDIA B200': 'B200', 'NVIDIA L40S': 'L40S', 'NVIDIA GeForce RTX 4090': 'RTX4090'}


def synchronized_time() -> float:
    """Return the time in seconds after the GPU has finished all work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> dict[str, float]:
    """Return peak GiB since the last call, allocated by tensors and reserved by torch;
    nothing without a GPU."""
    if not torch.cuda.is_initialized():
        return {}
    peak = {'peak_gib': torch.cuda.max_memory_allocated() / GIB,
            'peak_reserved_gib': torch.cuda.max_memory_reserved() / GIB}
    torch.cuda.reset_peak_memory_stats()
    return peak


def workers(bytes_each: float) -> int:
    """Return the number of workers that fit the cores and /dev/shm, since a full /dev/shm causes a bus
    error."""
    cores = len(os.sched_getaffinity(0))
    return min(MOST_WORKERS, cores, int(0.9 * shutil.disk_usage('/dev/shm').free / bytes_each))


def make_data(kind: str, device: str) -> None:
    """Write random images and vectors for stage 2, or captions and an LLM (16 GB for ``gpu``)
    for other kinds."""
    folder = OUT / 'data' / device
    sizes = SIZES[device]
    writers: dict[str, Callable[[Path], None]] = {
        'captions': partial(write_captions, sizes.captions),
        'warm_up': partial(write_captions, sizes.warm_up_captions),
        'llm': partial(write_llm, 'yamls/llms/llama3.1_8b/config.json', sizes.llm,
                       'cuda' if device == 'gpu' else 'cpu')}
    if kind == 'stage2':
        writers = {'images': partial(write_images, sizes.images, different=sizes.pictures),
                   'vectors': partial(write_vectors, folder / 'images/train', dim=sizes.teacher_dim)}
    for name, write in writers.items():
        if not (folder / name).is_dir():
            print(f'making {folder / name}', flush=True)
            part = folder / f'{name}.part'
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write(part)
            part.rename(folder / name)
    torch.cuda.empty_cache()


class Window(Callback):
    """Callback that measures seconds, tokens and peak memory of the steps after the warm-up."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.first, self.last, self.steps = warm_up, warm_up + steps, steps
        self.before: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.seconds = 0.0
        self.tokens = 0

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        tokens = state.timestamp.token.value
        if batch == self.first:
            self.before = memory()
            self._start = synchronized_time()
            self._tokens = tokens
        elif batch == self.last:
            self.seconds = synchronized_time() - self._start
            self.tokens = tokens - self._tokens
            self.peak = memory()


def make_checked_plan(config: Any) -> Any:
    """Plan a run on one GPU; a ConfigError if something will stop it."""
    with fake_ranks(1):
        plan = make_plan(config)
    print(plan, flush=True)
    if plan.errors:
        raise ConfigError('; '.join(plan.errors))
    return plan


def train_stage1(name: str, config: Stage1Config) -> Result:
    config.plan_tokens = config.text_encoder.max_length  # the actual mean is known only afterwards
    make_checked_plan(config)
    initialize(config, {})
    parts = stage1.make_parts(config, load_caption_tokenizer(config.text_encoder))
    measured = run_window(name, config, parts)
    config.plan_tokens = round(measured.tokens / (2 * measured.steps * config.global_train_batch_size))
    with fake_ranks(1):
        plan = make_plan(config)
    return training_summary(config, plan, measured)


def train_stage2(name: str, config: Stage2Config) -> Result:
    config.train_data.num_workers = 1
    plan = make_checked_plan(config)
    config.train_data.num_workers = workers(plan.shared_memory)
    initialize(config, {})
    return training_summary(config, plan, run_window(name, config, stage2.make_parts(config)))


def run_window(name: str, config: TrainConfig, parts: Parts) -> Window:
    """Train without checkpoints, and return what was measured after the warm-up."""
    trainer = build_trainer(config, parts.model, parts.train_data, parts.evaluators, parts.algorithms,
                            parts.callbacks)
    measured = Window(*window(name, str(config.device)))
    others = [callback for callback in trainer.state.callbacks if not isinstance(callback, CheckpointSaver)]
    trainer.state.callbacks = [*others, measured]
    fit(trainer, config)
    trainer.close()
    return measured


def training_summary(config: Any, plan: Any, measured: Window) -> Result:
    steps = measured.steps
    waits = read_metrics(Path(config.save_folder, 'metrics.jsonl'))['time/data_wait']
    waited = steps * statistics.mean(wait for step, wait in waits.items() if step >= measured.first)
    return summary(
        measured.seconds, steps, steps * config.global_train_batch_size, measured.tokens, plan, steps,
        measured.peak, data_wait_share=waited / measured.seconds, before=measured.before,
        device_batch=plan.device_batch, microbatch=plan.microbatch, num_workers=config.train_data.num_workers)


def extract(config: ExtractConfig) -> Result:
    """Measure an extraction as in `extract_embeddings`, from reading the first shard to writing the last."""
    device = get_device(config.device)
    set_up_process(device, config.precision)
    initialize_gloo()
    teacher: Any = teacher_source(config.teacher).load(device, config.batch_tokens, config.precision)

    def run(name: str) -> dict[str, int]:
        out = OutputFolder(Path(config.out, name))
        dataset = ExtractionTask(config.datasets[name], out, config.storage)
        return write_embeddings(dataset, teacher)

    run('warm_up')
    before = memory()
    start = synchronized_time()
    done = run('captions')
    seconds = synchronized_time() - start
    peak = memory()
    del config.datasets['warm_up']
    config.plan_tokens = round(done['tokens'] / done['captions'])
    with fake_ranks(1):
        plan: Any = make_plan(config)
    return summary(seconds, round(plan.steps), done['captions'], done['tokens'], plan, plan.steps, peak,
                   data_wait_share=None, before=before)


def summary(
    seconds: float, steps: int, items: int, tokens: int, plan: Any, planned_steps: float,
    peak: Mapping[str, float], **more: Any
) -> Result:
    """Return the result of `steps` in `seconds` between two synchronisations with the GPU.

    `items` are samples or captions, `tokens` exclude padding, the plan is that of `planned_steps`, and `peak`
    is in GiB.
    """
    recomputed = planned_steps * plan.cost.recomputed
    flops = planned_steps * plan.cost.flops - recomputed
    result: Result = {
        'per_second': items / seconds, 'seconds_per_step': seconds / steps, 'steps': steps,
        'tokens_per_second': tokens / seconds or None, 'tflop_per_step': flops / steps / 1e12,
        'recomputed_tflop_per_step': recomputed / steps / 1e12, 'mfu': None, 'mfu_with_recomputation': None,
        'plan_seconds_per_step': None, 'seconds_over_plan': None,
        'plan_peak_gib': plan.cost.peak / GIB, 'peak_over_plan': None}
    if peak:
        result['peak_over_plan'] = peak['peak_gib'] / result['plan_peak_gib']
        board = BOARDS.get(hardware())
        if board is not None:  # MFU as defined in the PaLM paper and for plan_mfu
            possible = GPUS[board].bf16 * 1e12 * seconds
            result['mfu'] = flops / possible
            result['mfu_with_recomputation'] = (flops + recomputed) / possible
            planned_seconds = planned_steps * plan.seconds(GPUS[board])
            result['plan_seconds_per_step'] = planned_seconds / steps
            result['seconds_over_plan'] = seconds / planned_seconds
    return result | dict(peak) | more


def main(name: str, device: str, path: str) -> None:
    start = time.perf_counter()
    case = CASES[name]
    run = OUT / 'runs' / device / name
    shutil.rmtree(run, ignore_errors=True)
    make_data(case.kind, device)
    args = arguments(name, device, run)
    config: Any = load_config(SCHEMAS[case.kind], args)
    if case.kind == 'extraction':
        result = extract(config)
    elif case.kind == 'stage2':
        result = train_stage2(name, config)
    else:
        result = train_stage1(name, config)
    result = {'case': name, 'args': args} | result
    write_json(path, result | {'seconds_of_case': time.perf_counter() - start, 'about': describe()})
    shutil.rmtree(run, ignore_errors=True)  # missing if the case wrote nothing


if __name__ == '__main__':
    main(*sys.argv[1:])
