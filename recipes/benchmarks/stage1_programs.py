# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark a step of stage 1 beside sentence-transformers, at once and with cached gradients:
python -m recipes.benchmarks.stage1_programs

Both tune SmolLM2-135M by LoRA on the same 32 pairs of captions of Flickr8k, which `make photographs` has
prepared.  The step is tokenisation, forward and backward pass.  sentence-transformers uses its loss for pairs
(`MultipleNegativesRankingLoss`), and `CachedMultipleNegativesRankingLoss` for cached gradients."""

import json
import random
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling

from llm2clip.data.captions import text_id
from llm2clip.data.schema import read_samples
from llm2clip.data.text_batches import split_packed
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer
from recipes.baselines.run import OUT, RUN, captions_of
from recipes.baselines.sentence_transformers_model import STAGE1, base, language_model
from recipes.benchmarks.measuring import peak_mb, run_alone, seconds_in_turns, write_result
from recipes.benchmarks.stage1_step import MICROBATCH, cached_step, plain_step

BATCH, ROUNDS = 32, 7
BOUNDS = {'plain': 0.8, 'cached': 0.9}
Step = Callable[[], None]


def caption_pairs() -> list[list[str]]:
    """Return two captions of each of the first photographs."""
    draw = random.Random(0)
    return [draw.sample(captions_of(sample), 2) for sample in islice(read_samples(RUN / 'data/train'), BATCH)]


def our_step(dtype: Any, cached: bool) -> Step:
    STAGE1.text_encoder.dtype = dtype
    encoder = build_text_encoder(STAGE1.text_encoder, STAGE1.lora)
    model = CaptionContrastive(encoder, STAGE1.logit_scale, symmetric=STAGE1.symmetric).train()
    tokenizer = load_caption_tokenizer(STAGE1.text_encoder)
    texts = dict(zip(('query', 'positive'), zip(*caption_pairs())))

    def step() -> None:
        batch: dict[str, Any] = {'index': torch.arange(BATCH)}
        for side, captions in texts.items():
            batch.update({f'{side}_{name}': value for name, value in tokenizer(captions).items()})
            batch[f'{side}_text_id'] = torch.tensor([text_id(caption) for caption in captions])
        if cached:
            cached_step(model, batch, MICROBATCH, split_packed)
        else:
            plain_step(model, *split_packed(batch, BATCH))

    return step


def their_step(dtype: Any, cached: bool) -> Step:
    STAGE1.text_encoder.dtype = dtype
    llm = language_model(str(OUT), 0.0)
    pooling = Pooling(llm.get_embedding_dimension(), 'mean')
    model = SentenceTransformer(modules=[llm, pooling], device='cpu').train()
    loss: Any = losses.MultipleNegativesRankingLoss(model, scale=STAGE1.logit_scale)
    if cached:
        # as many texts at once as a microbatch of pairs has
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, scale=STAGE1.logit_scale, mini_batch_size=2 * MICROBATCH)
    texts = list(zip(*caption_pairs()))

    def step() -> None:
        model.zero_grad()
        loss([model.preprocess(list(captions)) for captions in texts], None).backward()

    return step


STEPS = {'llm2clip': our_step, 'sentence-transformers': their_step}


def main() -> None:
    if not (OUT / 'llm').is_dir():
        base(str(OUT))
    for dtype in ('bfloat16', 'float32'):
        for kind in BOUNDS:
            cached = kind == 'cached'
            steps = {name: make(dtype, cached) for name, make in STEPS.items()}
            seconds = seconds_in_turns(steps, ROUNDS)
            peaks = {name: run_alone('recipes.benchmarks.stage1_programs', name, dtype, kind)
                     for name in STEPS}
            numbers = {'seconds': seconds, 'peak_mb': peaks}
            print(dtype, kind, numbers, flush=True)
            ratio = seconds['llm2clip'] / seconds['sentence-transformers']
            write_result(f'stage1_{kind}_{dtype}', f'seconds of a stage-1 step, {kind}, {dtype}',
                         'sentence-transformers', ratio, numbers, at_most=BOUNDS[kind],
                         correct=peaks['llm2clip'] < peaks['sentence-transformers'])


if __name__ == '__main__':
    if sys.argv[1:]:
        name, dtype, kind = sys.argv[1:]
        print(json.dumps(peak_mb(STEPS[name](dtype, kind == 'cached'))))
    else:
        main()
