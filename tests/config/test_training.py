# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Settings of a training that contradict each other are refused by the key of one of them."""

import pytest
from composer.utils import dist
from recipes_in_process import REQUIRED, SCHEMAS

from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.training.config_checks import check_train_config

ZEROSHOT = 'eval_zeroshot.z.source={name: clip_benchmark, local: x}'
VECTORS = 'train_data.streams.s.image_embeddings.local=x'
# Stage, key that is refused, and overrides.
RULES: list[tuple[int, str, list[str]]] = [
    (1, 'algorithms.grad_cache', ['objective=mntp', 'algorithms.grad_cache={}']),
    (1, 'eval_data', ['objective=mntp', 'eval_data.streams.s.local=x']),
    (1, 'text_encoder.dtype', ['fsdp={}', 'text_encoder.dtype=bfloat16']),
    (2, 'train_data.streams.s.repeat', ['train_data.streams.s.repeat=2', 'train_data.epoch_size=32']),
    (2, 'train_data.streams.b.proportion', ['train_data.streams.s.proportion=1', 'train_data.streams.b.local=x']),
    (2, 'train_data.streams.b.repeat',
     ['train_data.streams.s.proportion=1', 'train_data.streams.b={local: x, repeat: 1}']),
    (2, 'algorithms.channels_last', ['fsdp={}', 'algorithms.channels_last={}']),
    (2, 'model.vision.gradient_checkpointing',
     ['fsdp={activation_checkpointing: true}', 'model.vision.gradient_checkpointing=true']),
    (2, 'teacher', ['trainable_text.lora={}']),
    (2, 'trainable_text.lora', ['teacher=t', 'trainable_text={clip: {name: c}, lora: {}}']),
    (2, 'text_encoder_in_loop.enabled', ['trainable_text.clip.name=c', 'text_encoder_in_loop.enabled=true']),
    (2, 'initial_adapter', ['trainable_text.clip.name=c', 'initial_adapter=a']),
    (2, 'text_encoder_in_loop.enabled', ['teacher=t', 'trainable_text.lora={}', 'text_encoder_in_loop.enabled=true']),
    (2, 'teacher', ['text_encoder_in_loop.enabled=true']),
    (2, 'teacher', [ZEROSHOT]),
    (2, 'eval_zeroshot', [ZEROSHOT, 'teacher=t', 'train_data.teachers=[a, b]']),
    (2, 'eval_zeroshot', [ZEROSHOT.replace('.z.', '.eval.'), 'teacher=t']),
    (2, 'initial_adapter', ['initial_adapter=a', 'initial_weights=w']),
    (2, 'model.visual_projection', ['initial_adapter=a', 'model.visual_projection=linear']),
    (2, 'model.vision.lora', ['model.vision.lora={}', 'model.vision.freeze=true']),
    (2, 'model.visual_projection', ['model.visual_projection=pretrained', 'model.vision.pretrained=false']),
    (2, 'model.visual_projection', ['model.visual_projection=pretrained', 'model.vision.pretrained=true',
                                    'model.vision.feature_levels=1']),
    (2, 'model.heads', ['model.heads=3']),
    (2, 'loss.matryoshka_dims', ['model.heads=2', 'loss.matryoshka_dims=[64, 1280]']),
    (2, 'model.logit_bias', ['loss.name=siglip']),
    (2, 'model.logit_bias', ['model.logit_bias=-10']),
    (2, 'loss.name', ['loss.name=clap']),
    (2, 'loss.name', ['loss.name=no_module:Loss']),
    (2, 'loss.name', ['loss.name=user_losses:SETTINGS']),
    (2, 'loss.name', ['loss.name=user_losses:Bilinear', 'loss.arguments.dim=8', 'loss.matryoshka_dims=[8]']),
    (2, 'loss.name', ['loss.name=user_losses:Bilinear', 'loss.arguments.dim=8', 'loss.mask_equal_texts=true']),
    (2, 'loss.arguments', ['loss.arguments.dim=8']),
    (2, 'loss.arguments', ['loss.name=user_losses:Bilinear']),
    (2, 'loss.arguments.dims', ['loss.name=user_losses:Bilinear', 'loss.arguments.dims=8']),
    (2, 'loss.arguments.dim', ['loss.name=user_losses:Bilinear', 'loss.arguments.dim=x']),
    (2, 'algorithms.user_losses:Halved', ['algorithms={grad_cache: {}, user_losses:Halved: {}}']),
    (2, 'algorithms.user_losses:Halved', ['algorithms={user_losses:Halved: {}, grad_cache: {}}']),
    (2, 'model.vision.freeze', [VECTORS]),
    (2, 'train_data.horizontal_flip', [VECTORS, 'model.vision.freeze=true', 'train_data.horizontal_flip=0.5']),
    # Parts, device and ranks.
    (2, 'compile.bakend', ['fsdp={}', 'compile.bakend=inductor']),
    (2, 'device_train_microbatch_size', ['fsdp={}', 'device_train_microbatch_size=4']),
    (2, 'precision', ['fsdp={}', 'device=cpu', 'precision=amp_bf16']),
    (1, 'device_train_microbatch_size', ['device_train_microbatch_size=4']),
    (1, 'device_train_microbatch_tokens', ['device_train_microbatch_tokens=4096']),
    (1, 'device_train_microbatch_tokens', ['device_train_microbatch_tokens=64', 'algorithms.grad_cache={}']),
]


def refused_key(stage: int, args: list[str]) -> str:
    """Key of the error of the configuration, or of a check that needs the device and the ranks."""
    recipe = f'train_stage{stage}'
    with pytest.raises(ConfigError) as error:
        check_train_config(load_config(SCHEMAS[recipe], [*REQUIRED[recipe], *args]))
    return error.value.key


@pytest.mark.parametrize(('stage', 'key', 'args'), RULES)
def test_contradicting_settings_are_refused(stage: int, key: str, args: list[str]) -> None:
    assert refused_key(stage, args) == key


def test_algorithms_that_leave_the_loss_alone_go_with_grad_cache() -> None:
    algorithms = '{grad_cache: {}, clamp_logit_scale: {}, gradient_clipping: {}, channels_last: {}, patch_dropout: {}}'
    check_train_config(load_config(SCHEMAS['train_stage2'], [
        *REQUIRED['train_stage2'], f'algorithms={algorithms}',
        'algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 1}', 'device=cpu']))
    # Without it, a whole batch of one rank has no other samples.
    check_train_config(load_config(SCHEMAS['train_stage2'], [
        *REQUIRED['train_stage2'], 'algorithms={user_losses:Halved: {}}']))


def test_fsdp_sizes_divide_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, 'get_world_size', lambda: 8)
    args = ['global_train_batch_size=24', 'global_eval_batch_size=24', 'fsdp.replicate=2']
    allowed = [*REQUIRED['train_stage2'], *args, 'fsdp.reshard_after_forward=2']
    check_train_config(load_config(SCHEMAS['train_stage2'], allowed))
    assert refused_key(2, [*args, 'fsdp.replicate=3']) == 'fsdp.replicate'
    assert refused_key(2, [*args, 'fsdp.reshard_after_forward=8']) == 'fsdp.reshard_after_forward'
