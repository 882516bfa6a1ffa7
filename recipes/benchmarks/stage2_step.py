# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A step of stage 2 against the plain step: with GradCache, self-distillation, and three captions per image."""

import json
import sys
from functools import partial
from typing import Any

import torch
from composer.core.data_spec import default_split_batch

from llm2clip.config import ModelConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.training.algorithms.self_distillation import InitialImages
from recipes.benchmarks.measuring import DEVICE, peak_mb, run_alone, seconds_in_turns, write_result
from recipes.benchmarks.stage1_step import Batch, cached_step, plain_step

SMALL, BASE = 'vit_small_patch16_224', 'vit_base_patch16_224'
DIMS = {SMALL: 576, BASE: 4096}  # of the teacher's vectors
CHUNK, BATCHES, BASE_BATCH = 32, (64, 256, 1024), 8
CACHE = {'plain': plain_step, 'cached': partial(cached_step, microbatch=CHUNK, split=default_split_batch)}


def make(tower: str, batch_size: int) -> tuple[ComposerLLM2CLIP, Batch]:
    torch.manual_seed(0)
    batch = {'pixel_values': torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8),
             'text_embedding': torch.randn(batch_size, DIMS[tower]),
             **{name: torch.arange(batch_size) for name in ('index', 'text_id', 'sample_seed')}}
    config = ModelConfig(vision=VisionConfig(name=tower, pretrained=False), embed_dim=512)
    return ComposerLLM2CLIP(LLM2CLIP(config, DIMS[tower])).to(DEVICE).train(), batch


def measure_cache() -> None:
    peaks = {'cached': {size: run_alone('recipes.benchmarks.stage2_step', 'cached', size) for size in BATCHES},
             'plain': {size: run_alone('recipes.benchmarks.stage2_step', 'plain', size) for size in BATCHES[:2]}}
    model, batch = make(SMALL, BATCHES[0])
    seconds = seconds_in_turns({name: partial(step, model, batch) for name, step in CACHE.items()}, 3)
    write_result('image_grad_cache', f'seconds per step with GradCache, {BATCHES[0]} images in chunks of {CHUNK}',
                 'the plain step', seconds['cached'] / seconds['plain'], seconds, at_most=1.45)
    write_result('image_grad_cache_memory', f'peak memory at {BATCHES[-1]} images, chunks of {CHUNK}',
                 f'at {BATCHES[0]}', max(peaks['cached'].values()) / peaks['cached'][BATCHES[0]], peaks, at_most=1.15)


def measure_options() -> None:
    """Without the optimizer, which has the same to do in all of them."""
    model, batch = make(BASE, BASE_BATCH)
    initial, images = InitialImages(model.model), batch['pixel_values'].to(DEVICE)
    three: Any = {**batch, 'text_embedding': torch.randn(BASE_BATCH, 3, DIMS[BASE]),
                  'text_id': torch.arange(3 * BASE_BATCH).view(BASE_BATCH, 3)}
    seconds = seconds_in_turns({
        'plain': lambda: plain_step(model, batch),
        'self_distillation': lambda: plain_step(model, {**batch, 'initial_image_features': initial(images)}),
        'captions_per_image': lambda: plain_step(model, three)}, 6)
    for name, what in (('self_distillation', 'self-distillation'), ('captions_per_image', 'three captions per image')):
        write_result(name, f'seconds per step with {what}, batch {BASE_BATCH}', 'the plain step',
                     seconds[name] / seconds['plain'], seconds, at_most=1.4)


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(peak_mb(partial(CACHE[sys.argv[1]], *make(SMALL, int(sys.argv[2]))))))
    else:
        measure_cache()
        measure_options()
