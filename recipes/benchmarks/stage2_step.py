# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark a step of stage 2 with GradCache against the plain step, and CLIP's blockwise loss of a large
batch against autograd through the whole logit matrix."""

import json
import sys
from functools import partial

import torch
import torch.nn.functional as F
from composer.core.data_spec import default_split_batch

from llm2clip.config import ModelConfig, VisionConfig
from llm2clip.losses.contrastive import clip_loss
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from recipes.benchmarks.measuring import DEVICE, peak_mb, run_alone, seconds_in_turns, write_result
from recipes.benchmarks.stage1_step import Batch, cached_step, plain_step

TOWER, LLM_EMBED_DIM = 'vit_small_patch16_224', 576
CHUNK, BATCHES, LOSS_BATCH, LOSS_DIM = 32, (64, 256, 1024), 16384, 1280
CACHE = {'plain': plain_step, 'cached': partial(cached_step, microbatch=CHUNK, split=default_split_batch)}


def make(batch_size: int) -> tuple[ComposerLLM2CLIP, Batch]:
    torch.manual_seed(0)
    batch = {'pixel_values': torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8),
             'text_embedding': torch.randn(batch_size, LLM_EMBED_DIM)}
    for name in ('index', 'text_id', 'sample_seed'):
        batch[name] = torch.arange(batch_size)
    config = ModelConfig(vision=VisionConfig(name=TOWER, pretrained=False), embed_dim=512)
    return ComposerLLM2CLIP(LLM2CLIP(config, LLM_EMBED_DIM)).to(DEVICE).train(), batch


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale.exp() * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LOSSES = {'whole': plain_loss, 'blocks': partial(clip_loss, block_size=1024)}


def measure_loss(name: str) -> dict[str, float]:
    """Return the seconds of a loss and its gradients, and their peak memory in MiB beyond the features."""
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(LOSS_BATCH, LOSS_DIM, device=DEVICE), dim=-1).requires_grad_()
                for _ in '12']
    features.append(torch.full((1,), 3.0, device=DEVICE, requires_grad=True))

    def step() -> None:
        LOSSES[name](*features).backward()

    LOSSES[name](*(feature[:64].detach().requires_grad_() for feature in features)).backward()
    peak = peak_mb(step)
    return {'seconds': seconds_in_turns({name: step}, 1)[name], 'mb': peak}


def main() -> None:
    peaks = {'cached': {size: run_alone('recipes.benchmarks.stage2_step', 'cached', size)
                        for size in BATCHES},
             'plain': {size: run_alone('recipes.benchmarks.stage2_step', 'plain', size)
                       for size in BATCHES[:2]}}
    model, batch = make(BATCHES[0])
    seconds = seconds_in_turns({name: partial(step, model, batch) for name, step in CACHE.items()}, 3)
    write_result('image_grad_cache', f'seconds per step with GradCache, {BATCHES[0]} images in chunks of '
                 f'{CHUNK}', 'the plain step', seconds['cached'] / seconds['plain'], seconds, at_most=1.45)
    write_result('image_grad_cache_memory', f'peak memory at {BATCHES[-1]} images, chunks of {CHUNK}',
                 f'at {BATCHES[0]}', max(peaks['cached'].values()) / peaks['cached'][BATCHES[0]], peaks,
                 at_most=1.15)
    measured = {name: run_alone('recipes.benchmarks.stage2_step', name, LOSS_BATCH) for name in LOSSES}
    for unit, bound in (('seconds', 1.5), ('mb', 0.25)):
        write_result(f'blockwise_{unit}', f'{unit} of the CLIP loss in blocks, {LOSS_BATCH:,} pairs',
                     'the whole logit matrix', measured['blocks'][unit] / measured['whole'][unit], measured,
                     at_most=bound)


if __name__ == '__main__':
    if sys.argv[1:]:
        name, size = sys.argv[1:]
        measured = measure_loss(name) if name in LOSSES else peak_mb(partial(CACHE[name], *make(int(size))))
        print(json.dumps(measured))
    else:
        main()
