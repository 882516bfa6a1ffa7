# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A stage-2 step in chunks of 32 images against the plain step: time, and peak memory by global batch."""

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from composer.core.data_spec import default_split_batch

from llm2clip.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows
from llm2clip.benchmark import write_result
from llm2clip.config import ModelConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP

TOWER, DIM, CHUNK, BATCHES, ROUNDS = 'vit_small_patch16_224', 576, 32, (64, 256, 1024), 3
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def make(batch_size: int) -> tuple[ComposerLLM2CLIP, dict[str, Any]]:
    torch.manual_seed(0)
    batch = {'pixel_values': torch.randn(batch_size, 3, 224, 224), 'text_embedding': torch.randn(batch_size, DIM),
             **{name: torch.arange(batch_size) for name in ('index', 'text_id', 'sample_seed')}}
    model = ComposerLLM2CLIP(LLM2CLIP(ModelConfig(vision=VisionConfig(name=TOWER), embed_dim=512), DIM))
    return model.to(DEVICE).train(), batch


def to_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(DEVICE) for key, value in batch.items()}


def plain(model: ComposerLLM2CLIP, batch: dict[str, Any]) -> None:
    batch = to_device(batch)
    model.loss(model(batch), batch).backward()


def cached(model: ComposerLLM2CLIP, batch: dict[str, Any]) -> None:
    batch = with_rows(batch, model.feature_names)
    parts = default_split_batch(batch, CHUNK)
    gradients = cache_gradients(model, model.loss, batch, parts, to_device)
    for part in map(to_device, parts):
        (surrogate_loss(model(part), part, gradients) * len(part['index']) / len(batch['index'])).backward()


STEPS = {'plain': plain, 'cached': cached}


def seconds(name: str, model: ComposerLLM2CLIP, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    STEPS[name](model, batch)
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - start


def peak_mb(name: str, batch_size: int) -> float:
    """Peak memory of a process that does two steps, less what model and batch take."""
    done = subprocess.run([sys.executable, __file__, name, str(batch_size)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(name: str, batch_size: int) -> float:
    model, batch = make(batch_size)
    if DEVICE == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        STEPS[name](model, batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    STEPS[name](model, batch)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    peaks = {'cached': {size: peak_mb('cached', size) for size in BATCHES},
             'plain': {size: peak_mb('plain', size) for size in BATCHES[:2]}}
    model, batch = make(BATCHES[0])
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for name in STEPS:
        seconds(name, model, batch)
    for _ in range(ROUNDS):
        for name in STEPS:
            times[name].append(seconds(name, model, batch))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio, grown = medians['cached'] / medians['plain'], max(peaks['cached'].values()) / peaks['cached'][BATCHES[0]]
    write_result('image_grad_cache', f'step with gradient cache, {BATCHES[0]} images in chunks of {CHUNK}',
                 'the plain step', ratio, 1.45, ratio <= 1.45, {'seconds': medians})
    write_result('image_grad_cache_memory', f'peak memory at {BATCHES[-1]} images, chunks of {CHUNK}',
                 f'at {BATCHES[0]}', grown, 1.15, grown <= 1.15, {'peak_mb_by_batch': peaks})


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(measure_peak(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
