# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Alignment of a frozen tower on the photographs of `make photographs`, from the vectors of both sides."""

from recipes.ablations.photograph_suite import PHOTOGRAPHS, STREAM, TEST, TESTS, TRAIN
from recipes.ablations.suite import Ablation, Step, Suite, Variant, extraction

RUN, TEACHER = f'{PHOTOGRAPHS}/align_ablations', f'{PHOTOGRAPHS}/stage1/teacher'


def _images(views: int) -> tuple[Step, str]:
    """Return the step that embeds the images with `views` views, and the override that reads them."""
    out = f'{RUN}/images_{views}'
    step = Step(f'{out}/config.yaml', (
        'recipes/extract_image_embeddings.py', 'yamls/flickr8k/align_extract.yaml', f'views={views}',
        'horizontal_flip=0.5', f'out={out}'))
    return step, f'{STREAM}.image_embeddings.local={out}/train'


def _captions(*suffixes: str) -> tuple[str, ...]:
    """Return the overrides that draw each image's captions and, for every suffix, what was made of them."""
    weights = ', '.join(f'"{i}{suffix}": 1.0' for suffix in ('', *suffixes) for i in range(5))
    return (READ, f'{STREAM}.embeddings.smollm2.local={RUN}/texts/train',
            f'train_data.caption_weights={{{weights}}}')


(IMAGES, READ), (TWO, READ_TWO), (FOUR, READ_FOUR) = map(_images, (0, 2, 4))
TEXTS = extraction(
    f'{RUN}/texts', {'train': TRAIN}, f'teacher={TEACHER}', 'caption_parts=1', 'prompts={objects: "{caption} The '
    'objects in this picture:", scene: "{caption} The place and the mood of this picture:"}')

VARIANTS = {
    'align': Variant((READ,), needs=(IMAGES,)),
    'two_views': Variant((READ_TWO,), needs=(TWO,)),
    'four_views': Variant((READ_FOUR,), needs=(FOUR,)),
    'parts': Variant(_captions('@part1'), needs=(IMAGES, TEXTS)),
    'prompts': Variant(_captions('@objects', '@scene'), needs=(IMAGES, TEXTS)),
    'prompts_all_15': Variant((*_captions('@objects', '@scene'), 'train_data.captions_per_image=15'),
                              needs=(IMAGES, TEXTS)),
    'mlp': Variant((READ, 'model.visual_projection=mlp', 'model.visual_projection_expansion=2'), needs=(IMAGES,)),
}
ABLATIONS = (
    Ablation('Augmented views of the images help', 'none', ('four_views', 'two_views', 'align'), TEST),
    Ablation('Several prompts per caption help (FLAME, arXiv 2411.11927)', 'none',
             ('prompts', 'prompts_all_15', 'align'), TEST),
    Ablation('Parts of captions help (CLIPS, arXiv 2411.16828)', 'none', ('parts', 'align'), TEST),
    Ablation('A linear projection of the images is better than an MLP', 'none', ('align', 'mlp'), TEST),
)

SUITE = Suite(RUN, f'{PHOTOGRAPHS}/embeddings/config.yaml', ('yamls/flickr8k/align.yaml', 'eval_data=null'), VARIANTS,
              TESTS, ABLATIONS, 'yamls/flickr8k/ablations_evaluate.yaml')
