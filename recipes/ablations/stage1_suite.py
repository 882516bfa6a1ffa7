# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ablations of the settings of stage 1: SmolLM2-135M on Flickr8k's captions.

The measure is the retrieval accuracy between the first two captions of an image of Flickr8k's test split,
without instruction.
"""

from recipes.ablations.suite import Ablation, Suite, Variant

RUN, DATA = 'runs/ablations/stage1', 'runs/flickr8k/data'
INSTRUCTION = 'Given a caption, retrieve a similar relevant caption. '
SHORT_WARM_UP = 'scheduler.t_warmup=20ba'
TRAIN = ('yamls/stage1/smollm2_135m_cpu.yaml', f'train_data.streams.captions.local={DATA}/train',
         'eval_data=null', 'text_encoder.dtype=${if_bf16:bfloat16,float32}')
# A second phase begins with the text encoder of `make photographs`.
FIRST = 'runs/flickr8k/stage1'
SECOND = f'text_encoder.adapters=[{FIRST}/lora]'

VARIANTS = {
    'nothing': Variant(),
    'no gradient clipping': Variant(('algorithms.gradient_clipping.clipping_threshold=1e9',)),
    'scheduler.t_warmup: 20ba': Variant((SHORT_WARM_UP,)),
    'optimizer.betas: [0.9, 0.999], t_warmup: 20ba': Variant(('optimizer.betas=[0.9, 0.999]', SHORT_WARM_UP)),
    'causal': Variant(('text_encoder.bidirectional=false',)),
    'instruction before the query': Variant((f'text_encoder.instruction="{INSTRUCTION}"',)),
    'logit_scale 20': Variant(('logit_scale=20',)),
    'LoRA of rank 64': Variant(('lora.r=64', 'lora.lora_alpha=128')),
    'pooling: last': Variant(('text_encoder.pooling=last',)),
    'MNTP before it': Variant(warm_start=(
        'objective=mntp', "train_data.texts={'0': 1, '1': 1, '2': 1, '3': 1, '4': 1}",
        'global_train_batch_size=64', 'max_duration=75ba', SHORT_WARM_UP)),
    '128 pairs by GradCache, a quarter as many steps': Variant((
        'algorithms.grad_cache={}', 'global_train_batch_size=128', 'device_train_microbatch_size=32',
        'max_duration=38ba', 'scheduler.t_warmup=10ba')),
}
PHASES = {
    '300 steps': Variant(('max_duration=300ba',)),
    '112 more steps': Variant((SECOND, 'max_duration=112ba')),
}
TESTS = {'Flickr8k': 'test'}
ABLATIONS = (
    Ablation('The shipped settings are the best', 'none, its LLM has 8 billion weights', tuple(VARIANTS)),
    Ablation('One long training is better than two', 'none', tuple(PHASES)),
)

SUITE = Suite(RUN, f'{FIRST}/teacher/text_encoder.json', TRAIN, VARIANTS | PHASES, TESTS, ABLATIONS,
              captions=f'{DATA}/test')
