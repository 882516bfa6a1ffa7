# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Measure one case of `cases.py` and write its result: one_case.py NAME gpu|cpu RESULT.json

A training is planned and made by the functions that its recipe calls, and runs Composer's loop; checkpoints alone are
left out.
"""

import itertools
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Optional, Union

import torch
from cases import CASES, OUT, SCHEMAS, SIZES, arguments, window
from composer import Callback, State
from composer.callbacks import CheckpointSaver
from composer.loggers import Logger
from composer.utils import dist
from data import make_images, make_texts
from machine import about, peak_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.config import ConfigError, ExtractConfig, Stage1Config, Stage2Config
from llm2clip.config.files import load_config
from llm2clip.data.schema import IMAGE, read_samples
from llm2clip.device import open_device
from llm2clip.evaluation.images import encode_batches
from llm2clip.evaluation.models import TrainedLLM2CLIP
from llm2clip.files import write_json
from llm2clip.folders import OutputFolder
from llm2clip.planning.plan import plan_extraction, plan_stage1, plan_stage2
from llm2clip.planning.pretended import pretended_ranks
from llm2clip.stages import stage1, stage2
from llm2clip.teacher.extraction import extract_sidecar
from llm2clip.teacher.sources import build_caption_teacher
from llm2clip.teacher.text_encoder import load_caption_tokenizer
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.trainer import begin, fit

Result = dict[str, Any]
GIB = 2**30
MOST_WORKERS = 16


def now() -> float:
    """In seconds, when the GPU has nothing left to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> dict[str, float]:
    """Most GiB since the last call, as tensors take them and as torch has reserved them."""
    if not torch.cuda.is_initialized():
        return {}
    found = {'peak_gib': torch.cuda.max_memory_allocated() / GIB,
             'peak_reserved_gib': torch.cuda.max_memory_reserved() / GIB}
    torch.cuda.reset_peak_memory_stats()
    return found


def workers(bytes_each: float) -> int:
    """As many as there are cores and as fit /dev/shm, which a full one would end by a bus error."""
    cores = len(os.sched_getaffinity(0))
    return min(MOST_WORKERS, cores, int(0.9 * shutil.disk_usage('/dev/shm').free / bytes_each))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Window(Callback):
    """Measures the steps after the first ones."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.first, self.last = warm_up, warm_up + steps
        self.before: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.seconds = 0.0
        self.tokens = 0
        self.copied: dict[str, float] = {}
        self._marks: list[Any] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        batch, tokens = state.timestamp.batch.value, state.timestamp.token.value
        if batch == self.first:
            self.before = memory()
            self._start, self._tokens = now(), tokens
        if batch >= self.first:
            self._marks.append(self._mark())
        if batch == self.last:
            self.seconds, self.tokens = now() - self._start, tokens - self._tokens
            self.peak = memory()
            self.copied = self._copy(state)

    def _mark(self) -> Any:
        """On the GPU's own clock, without waiting for it."""
        if not torch.cuda.is_initialized():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream())
        return event

    def step_seconds(self) -> list[float]:
        """Of each step."""
        pairs = itertools.pairwise(self._marks)
        if not torch.cuda.is_initialized():
            return [end - start for start, end in pairs]
        return [start.elapsed_time(end) / 1000 for start, end in pairs]

    def _copy(self, state: State) -> dict[str, float]:
        """Bytes of a batch and the seconds that its copy to the GPU takes, the best of three."""
        seconds = []
        for _ in range(3):
            start = now()
            state.device.batch_to_device(state.batch)
            seconds.append(now() - start)
        size = sum(value.nbytes for value in state.batch.values() if isinstance(value, torch.Tensor))
        return {'bytes': size, 'seconds': min(seconds)}


def train(name: str, config: Union[Stage1Config, Stage2Config]) -> Result:
    (warm_up, steps), data = window(name, config.device or 'gpu'), config.train_data
    with pretended_ranks(1):
        if isinstance(config, Stage1Config):
            config.plan_tokens = config.text_encoder.max_length  # what they really have is known afterwards
            plan: Any = plan_stage1(config)
        else:
            data.num_workers = 1
            plan: Any = plan_stage2(config)
    print(plan, flush=True)
    if plan.problems:
        raise ConfigError('; '.join(plan.problems))
    if isinstance(config, Stage1Config):
        begin(config)
        trainer, _ = stage1.make_trainer(config, load_caption_tokenizer(config.text_encoder))
    else:
        data.num_workers = workers(plan.shared_memory)
        trainer = stage2.make_trainer(config)
    measured = Window(warm_up, steps)
    others = [callback for callback in trainer.state.callbacks if not isinstance(callback, CheckpointSaver)]
    trainer.state.callbacks = [*others, measured]
    start = time.perf_counter()
    fit(trainer, config)
    warming_up = time.perf_counter() - start - measured.seconds
    trainer.close()
    items = steps * config.global_train_batch_size
    if isinstance(config, Stage1Config):
        plan.cost.shorten(measured.tokens / (2 * items * config.text_encoder.max_length))
    waits = read_metrics(Path(config.save_folder, 'metrics.jsonl'))['time/data_wait']
    waited = steps * statistics.mean(wait for step, wait in waits.items() if step >= warm_up)
    each = measured.step_seconds()
    return summary(
        measured.seconds, steps, items, steps * (plan.cost.flops - plan.cost.recomputed), steps * plan.cost.recomputed,
        measured.tokens, waited, plan.cost.peak, measured.peak, before=measured.before, warm_up_seconds=warming_up,
        host_to_device=measured.copied, device_batch=plan.device_batch, microbatch=plan.microbatch,
        num_workers=data.num_workers,
        step_seconds={'median': statistics.median(each), 'least': min(each), 'most': max(each)})


# ---------------------------------------------------------------------------------------------------------------------
# Forward passes
# ---------------------------------------------------------------------------------------------------------------------


def extract(name: str, config: ExtractConfig) -> Result:
    """As `extract_embeddings` does it, from the first shard that is read to the last that is written."""
    device = open_device(config.device, config.precision)
    dist.initialize_dist(device, config.dist_timeout)
    teacher: Any = build_caption_teacher(config, device)
    embed, embedding = teacher.embed_tokens, 0.0

    def clocked(*args: Any, **kwargs: Any) -> Any:
        nonlocal embedding
        start = now()
        embedded = embed(*args, **kwargs)
        embedded.vectors.cpu()  # when it is done
        embedding += now() - start
        return embedded

    def run(name: str) -> dict[str, int]:
        return extract_sidecar(config.datasets[name], OutputFolder(Path(config.out, name)), teacher, config.storage,
                               config.normalize, {'precision': config.precision}, 8 * config.batch_tokens)

    run('warm_up')
    teacher.embed_tokens = clocked
    before, start = memory(), now()
    done = run('captions')
    seconds, found = now() - start, memory()
    del config.datasets['warm_up']
    config.plan_tokens = round(done['tokens'] / done['captions'])
    with pretended_ranks(1):
        plan: Any = plan_extraction(config)
    return summary(seconds, round(plan.repeats), done['captions'], plan.cost.flops * plan.repeats, 0, done['tokens'],
                   seconds - embedding, plan.cost.peak, found, before=before)


def features(name: str, config: Stage2Config) -> Result:
    """Images of an evaluation, from encoded images to features on the host."""
    size, batch, on_cpu = config.model.vision.image_size, config.global_eval_batch_size, config.device == 'cpu'
    (warm_up, steps), dim = window(name, config.device or 'gpu'), SIZES[config.device or 'gpu'].teacher_dim
    with torch.device('meta'):
        pretended = stage2.make_model(config, dim, load_weights=False).model.eval()
    # Fused attention has no formula on the meta device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pretended.get_image_features(torch.empty(1, 3, size, size, dtype=torch.uint8, device='meta'))
    tower = open_device(config.device, config.precision).module_to_device(
        stage2.make_model(config, dim, load_weights=False).model.eval())
    model = TrainedLLM2CLIP(tower, lambda texts: (torch.empty(0), 0), 'fp32' if on_cpu else 'amp_bf16')
    there = [sample[IMAGE] for sample in read_samples(config.train_data.streams['images'].local)]
    images = list(itertools.islice(itertools.cycle(there), (warm_up + steps) * batch))
    n_workers, start = workers(2 * batch * 3 * size**2), 0.0
    for i, _ in enumerate(encode_batches(model, images.__getitem__, [''] * len(images), batch, n_workers), 1):
        if i == warm_up:
            memory()
            start = now()
    return summary(now() - start, steps, steps * batch, steps * batch * counter.get_total_flops(), peak=memory(),
                   device_batch=batch, num_workers=n_workers)


# ---------------------------------------------------------------------------------------------------------------------
# Result
# ---------------------------------------------------------------------------------------------------------------------


def summary(
    seconds: float, steps: int, items: int, flops: float, recomputed: float = 0, tokens: int = 0,
    waited: Optional[float] = None, planned: Optional[int] = None, peak: Optional[dict[str, float]] = None, **more: Any
) -> Result:
    """What is written.

    Args:
        seconds: Between two moments at which the GPU had nothing left to do.
        steps: Training steps or batches in that time.
        items: Samples or captions.
        flops: Those that the plan counts, without recomputation.
        recomputed: Those besides.
        tokens: Without padding; 0 for images.
        waited: Seconds without a batch, as the host sees it.
        planned: Peak in bytes, as planned.
        peak: As `memory` gives it.
        **more: What else is known.
    """
    top = (peak_of(torch.cuda.get_device_name()) or 0) * 1e12 * seconds if torch.cuda.is_initialized() else 0
    taken, plan_gib = (peak or {}).get('peak_gib'), None if planned is None else planned / GIB
    return {
        'per_second': items / seconds, 'seconds_per_step': seconds / steps, 'steps': steps,
        'tokens_per_second': tokens / seconds or None, 'tflop_per_step': flops / steps / 1e12,
        'recomputed_tflop_per_step': recomputed / steps / 1e12,
        # As of PaLM, and as plan_mfu means it.
        'mfu': flops / top if top else None, 'mfu_with_recomputation': (flops + recomputed) / top if top else None,
        'plan_peak_gib': plan_gib, 'peak_over_plan': taken / plan_gib if taken and plan_gib else None,
        'data_wait_share': None if waited is None else waited / seconds, **(peak or {}), **more}


def main(name: str, device: str, path: str) -> None:
    case, start = CASES[name], time.perf_counter()
    machine, run = about(device), OUT / 'runs' / device / name
    shutil.rmtree(run, ignore_errors=True)
    (make_images if case.kind in ('stage2', 'features') else make_texts)(device)
    torch.cuda.empty_cache()
    args = arguments(name, device, run)
    measure: Any = {'extraction': extract, 'features': features}.get(case.kind, train)
    found = measure(name, load_config(SCHEMAS[case.kind], args))
    write_json(path, {'case': name, 'args': args, **found, 'seconds_of_case': time.perf_counter() - start,
                      'machine': machine})
    shutil.rmtree(run, ignore_errors=True)  # one that writes nothing has none


if __name__ == '__main__':
    main(*sys.argv[1:])
