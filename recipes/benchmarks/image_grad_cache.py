# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A stage-2 step in chunks of 32 images against the plain step: time, and peak memory by global batch."""

import json
import sys
from functools import partial
from typing import Any

import torch
from bench_result import write_result
from composer.core.data_spec import default_split_batch
from grad_cache import DEVICE, cached_step, measure_peak, median_seconds, peak_mb, plain_step

from llm2clip.config import ModelConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP

TOWER, DIM, CHUNK, BATCHES = 'vit_small_patch16_224', 576, 32, (64, 256, 1024)
STEPS = {'plain': plain_step, 'cached': partial(cached_step, microbatch=CHUNK, split=default_split_batch)}


def make(batch_size: int) -> tuple[ComposerLLM2CLIP, dict[str, Any]]:
    torch.manual_seed(0)
    batch = {'pixel_values': torch.randn(batch_size, 3, 224, 224), 'text_embedding': torch.randn(batch_size, DIM),
             **{name: torch.arange(batch_size) for name in ('index', 'text_id', 'sample_seed')}}
    config = ModelConfig(vision=VisionConfig(name=TOWER, pretrained=False), embed_dim=512)
    model = ComposerLLM2CLIP(LLM2CLIP(config, DIM))
    return model.to(DEVICE).train(), batch


def main() -> None:
    peaks = {'cached': {size: peak_mb(__file__, 'cached', size) for size in BATCHES},
             'plain': {size: peak_mb(__file__, 'plain', size) for size in BATCHES[:2]}}
    medians = median_seconds(STEPS, *make(BATCHES[0]))
    ratio, grown = medians['cached'] / medians['plain'], max(peaks['cached'].values()) / peaks['cached'][BATCHES[0]]
    write_result('image_grad_cache', f'seconds per step with gradient cache, {BATCHES[0]} images in chunks of {CHUNK}',
                 'the plain step', ratio, 1.45, ratio <= 1.45, medians)
    write_result('image_grad_cache_memory', f'peak memory at {BATCHES[-1]} images, chunks of {CHUNK}',
                 f'at {BATCHES[0]}', grown, 1.15, grown <= 1.15, peaks)


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(measure_peak(STEPS[sys.argv[1]], *make(int(sys.argv[2])))))
    else:
        main()
