# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A stage-2 step of ViT-B/16 with self-distillation, and one with three captions per image, against the plain step.

Without the optimizer, which has the same to do in all of them.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from bench_result import write_result

from llm2clip.config import Stage2Config
from llm2clip.config.files import load_config
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.training import stage2
from llm2clip.training.algorithms.self_distillation import InitialImages

BATCH, DIM, ROUNDS = 8, 4096, 6
YAML = str(Path(__file__).parents[2] / 'yamls/stage2/paper.yaml')
Batch = dict[str, Any]


def make_batch(captions: int) -> Batch:
    """Random pixels and vectors, one vector per caption."""
    one = captions == 1
    return {
        'index': torch.arange(BATCH), 'sample_seed': torch.arange(BATCH),
        'pixel_values': torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8),
        'text_embedding': torch.randn(BATCH, DIM) if one else torch.randn(BATCH, captions, DIM),
        'text_id': torch.arange(BATCH) if one else torch.arange(BATCH * captions).view(BATCH, captions)}


def step(model: ComposerLLM2CLIP, captions: int = 1, initial: Optional[InitialImages] = None) -> float:
    """Seconds from a batch to its gradients."""
    batch = make_batch(captions)
    model.zero_grad()
    start = time.perf_counter()
    if initial is not None:
        batch['initial_image_features'] = initial(batch['pixel_values'])
    model.loss(model(batch), batch).backward()
    return time.perf_counter() - start


def main() -> None:
    config = load_config(Stage2Config, [
        YAML, 'model.vision.name=vit_base_patch16_224', 'model.vision.pretrained=false',
        'model.vision.gradient_checkpointing=false', 'device=cpu',
        f'global_train_batch_size={BATCH}', 'save_folder=unused', 'run_name=bench', 'train_data.caption_mix={a: 1.0}',
        'train_data.streams.unused.local=unused'])
    torch.manual_seed(0)
    model = stage2.make_model(config, DIM)
    steps = {'plain': partial(step, model),
             'self_distillation': partial(step, model, initial=InitialImages(model.model)),
             'captions_per_image': partial(step, model, captions=3)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + ROUNDS):
        for name in sorted(steps, reverse=turn % 2 == 0):
            seconds[name].append(steps[name]())
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, what in (('self_distillation', 'self-distillation'), ('captions_per_image', 'three captions per image')):
        ratio = medians[name] / medians['plain']
        write_result(name, f'seconds per step with {what}, batch {BATCH}', 'the plain step', ratio, 1.4, ratio <= 1.4,
                     medians)


if __name__ == '__main__':
    main()
