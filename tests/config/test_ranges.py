# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Values out of range: each is refused by its key, for every recipe, before anything is read."""

import re

import pytest
from recipes_in_process import REQUIRED, SCHEMAS

from llm2clip.config import ranges
from llm2clip.config.loading import check_values, load_config
from llm2clip.errors import ConfigError
from llm2clip.training.config_checks import check_train_config

PARTS = ('optimizer.', 'scheduler.', 'algorithms.', 'callbacks.', 'loggers.')
# Recipe -> overrides, of which each is refused; ranges of single numbers are tested with their types below.
BAD = {
    'train_stage2': [
        'eval_first=perhaps', 'precision=fp8', "checkpoint_folder=''", 'train_data.streams.s=a', 'optimizer.lr=fast',
        'optimizer.betas=[0.9]', 'scheduler.name=cosin', 'scheduler={name: cosine_with_warmup}',
        'callbacks.save_best={label: eval}', 'algorithms.clamp_logit_scale.maximum=0',
        'algorithms.gradient_clipping={clipping_type: norm}',
        'algorithms.patch_dropout.rate=1', 'loggers.wandb.project=[a]', 'callbacks.save_best={metric: [a]}',
        'fsdp=true', 'fsdp.reshard_after_forward=1.5', 'fsdp.replicate=3', 'compile=true', 'compile.fullgraph=1',
        'train_data.streams.s.caption_weights={a: 0, b: 0}', 'trainable_text.clip={pretrained: true}',
        'model.vision.mean=[0.5]', 'loss.matryoshka_dims=[4, 2000]', 'lr_scale={adapter: nan}', 'eval_zeroshot={a: {}}',
        "eval_zeroshot={'': {source: {name: x}}}", "teacher=''", 'teacher=[]', 'teacher=[a]', 'teacher={name: x}',
        'teacher=[a, [b]]', 'teacher={type: clip_text, name: x}', 'train_data.captions_per_image=1000000',
        'model.vision.lora.r=100000', 'model.embed_dim=1000000000', 'model.vision.image_size=100000000',
        'train_data.epoch_size=1e15', 'train_data.streams.s.repeat=1e18', 'max_duration=1e400ba',
        'scheduler={name: linear_with_warmup, t_warmup: -1ba}', 'checkpoint_folder=s4://bucket',
        'save_folder=s3://bucket/x', 'train_data.streams.s.remote=https://host/x',
    ],
    'train_stage1': [
        'global_train_batch_size=1.5', 'device_train_microbatch_size=9', 'checkpoint_folder=s3://me:secret@host/bucket',
        'train_data.streams={}', 'train_data=a', 'optimizer.lr=nan', 'scheduler={name: cosine, t_max: soon}',
        'callbacks.speed_monitor.window_size=x', 'callbacks.save_best={metric: cra}', 'loggers.wandbb={}',
        'algorithms.gradient_clipping={clipping_type: none, clipping_threshold: 1}',
        'train_data.pairs=[{query: [], positive: [a]}]', 'train_data.streams.s.texts={a: 0}',
    ],
    'prepare_data': [
        "out=''", 'size_limit=big', 'image_quality=0', 'shard_index=1', "require_any_caption=['']",
        'out_remote=sftp://host/x', "out_remote='s3://bucket/a#1'",
    ],
    'extract_embeddings': ['datasets={}', 'datasets={../../x: {local: d}}', 'teacher=[a, b]'],
    'evaluate': [
        'models={}', 'models=[a]', 'models.m.text=llms', 'models.m.weights=newest', 'models.m.wise_ft_alpha=-0.1',
        'cra=true', 'cra.caption_keys=[a]', 'baseline=n', 'averages.a=[]', 'averages.a=retrieval.r',
        'averages.a=[retrieval]', 'averages.a=[zeroshot.r]', 'retrieval={}',
        'zeroshot.z={source: {name: x}, metric: top5}',
    ],
    'export_hf': ['truncate_dim=0'],
    'search': ['top=0', "index=''"],
    'train_inheritance': ['teacher={type: clip_text, name: x}'],
    'import_official': ['template=llama2', 'teacher=null', 'teacher=[a, b]', 'vision={name: x, mean: [1]}'],
    'report': ['steps={}', "steps={a: ''}"],
}


@pytest.mark.parametrize('recipe', BAD)
def test_a_bad_value_is_refused_by_its_key(recipe: str) -> None:
    for override in BAD[recipe]:
        key = override.partition('=')[0]
        extra = ['cra.captions=c'] if key.startswith('cra.') else []
        with pytest.raises(ConfigError) as error:
            required = [arg for arg in REQUIRED[recipe] if not arg.startswith((f'{key}=', f'{key}.'))]
            config = load_config(SCHEMAS[recipe], [*required, *extra, override])
            assert recipe.startswith('train'), 'the configuration alone decides'
            check_train_config(config)
        # Of a part's argument the key may be that of the part.
        part = key.rsplit('.', 1)[0] if key.startswith(PARTS) else key
        assert re.match(rf'(required but not set: )?{re.escape(part)}[ .:[]', str(error.value)), (override, error.value)
        assert 'secret' not in str(error.value) and '\n' not in str(error.value)


OUT_OF_RANGE = {
    'Count': [0, -1, 1.5, 'many', 1e15], 'Natural': [-1, 1e15], 'Seed': [-1, 2**32], 'Port': [0, 65536],
    'Positive': [0, float('nan'), float('inf')], 'Weight': [-1, float('nan')], 'Share': [-0.1, 1.1, float('nan')],
    'Text': [''], 'Texts': [[], ['a', 'a'], ['']], 'Dims': [[4, 4], [8, 4], [0]], 'Mix': [{'a': 0}, {'': 1}],
    'Time': ['-1ep', '0ba', '1', 'ep', '1epoch', '1.5ep', 'nanep', '2dur', '5 ba', '1e-3ba', '1e400ba'],
    'Duration': ['0.5dur', '1e16sp'], 'CropScale': [[2, 1], [1, 0.5], [0, 1], [0.5]],
    'Size': ['0mb', 'big', '-1mb', '64qb'], 'FolderName': ['', '..', '.a', 'a/b', 'a\n', '\ud800', 'a' * 201, 5],
}


@pytest.mark.parametrize('name', OUT_OF_RANGE)
def test_a_type_has_its_range(name: str) -> None:
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ConfigError, match=', expected'):
            check_values(getattr(ranges, name), value)
